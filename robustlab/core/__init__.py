"""Nouns and rules; imports torch, numpy and safetensors only."""
