"""Folds adapters into the weights of a base model, in memory or into a folder that any diffusers program loads."""
