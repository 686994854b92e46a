"""The paper's figures: what each one trains, and how it is drawn; needs the extra `[study]`."""
