"""The heart: entries, loans, the waiting line.  No socket, no clock, no pid of its own."""

from fdbroker.lender.ledger import Ledger
from fdbroker.lender.lender import Lender
from fdbroker.lender.load import load
from fdbroker.lender.parts import Entry, Peer, Session, Wish

__all__ = ["Entry", "Ledger", "Lender", "Peer", "Session", "Wish", "load"]
