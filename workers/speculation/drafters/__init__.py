"""Where drafts come from: one class for each method."""
