"""The draft worker: keeps guessing beyond what is committed. Nothing it does can change the output."""
