"""What warm-up and MoCa share: joint reconstruction of masked text tokens and masked patches."""
