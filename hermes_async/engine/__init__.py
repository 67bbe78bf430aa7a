"""What does a user call? The engine, its sessions, and how prompts, texts and images become requests."""
