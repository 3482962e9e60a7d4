"""The borrower's side: the client, its sessions, and loans."""
