"""HTTP: routes bound to the contract, thin handlers, authentication, RFC 9457 problems."""
