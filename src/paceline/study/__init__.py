"""Many runs side by side, and what they say; needs the extra `[train]`."""
