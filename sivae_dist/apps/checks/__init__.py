"""What `sivae-dist doctor` looks at, one file a subject. Nothing beyond the standard library is imported at the top."""
