"""Normalisation passes: drop what changes no value, so that matchers see one spelling. All of them are idempotent."""
