"""What a person is shown: progress and tables as text."""
