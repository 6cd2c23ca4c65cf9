"""The contracts: the HTTP interface, the configuration, the transfer token and the database schema."""
