"""Write captions and question-answer pairs for images, with a causal vision-language model or an endpoint."""
