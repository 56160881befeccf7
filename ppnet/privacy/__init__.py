"""The mechanism: sampling, clipping, noise, accounting, and the ledger."""
