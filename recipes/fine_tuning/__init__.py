"""Fine-tunes pretrained Hugging Face models with predictive coding."""
