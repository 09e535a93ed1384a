"""What the dashboard shows, as plain numbers and words: from frames, without Textual."""
