"""The tables of `cache.sqlite`.

Deleting is left to the tables themselves, so that no way of deleting forgets half of it: without
its block an answer is gone, without its last answer or its last root a block is, and a root is
gone with any of its leaves. Only what is pinned stays, and what a program put.
"""

from __future__ import annotations

#: "pmc1"; names the file's kind in its header.
APPLICATION_ID = 0x706D6331
#: Another version is not read but set aside: all of it can be computed again.
VERSION = 5

TABLES = """
-- IPFS blocks by their sha2-256, so that a block is found by its raw and its dag-cbor CID alike.
-- Not WITHOUT ROWID: there, what is longer than a quarter of a page takes a page of its own.
CREATE TABLE block (
    digest BLOB NOT NULL UNIQUE,
    size INTEGER NOT NULL,
    used_at INTEGER NOT NULL,          -- s; what was used longest ago is evicted first
    pinned INTEGER NOT NULL DEFAULT 0, -- set from `pin` and `pinned_below`
    put INTEGER NOT NULL DEFAULT 0,    -- by a program, which may have it given to others
    data BLOB NOT NULL
);
CREATE INDEX block_by_use ON block (pinned, used_at);

-- The leaves of the roots of large answers.
CREATE TABLE link (
    root BLOB NOT NULL REFERENCES block (digest) ON DELETE CASCADE,
    leaf BLOB NOT NULL REFERENCES block (digest) ON DELETE CASCADE,
    PRIMARY KEY (root, leaf)
) WITHOUT ROWID;
CREATE INDEX link_by_leaf ON link (leaf);

-- What is pinned: under which CID, and with all that is below it or alone.
CREATE TABLE pin (
    digest BLOB PRIMARY KEY REFERENCES block (digest) ON DELETE CASCADE,
    cid BLOB NOT NULL,
    recursive INTEGER NOT NULL
) WITHOUT ROWID;
-- The blocks that are kept for the sake of a pin.
CREATE TABLE pinned_below (
    root BLOB NOT NULL REFERENCES pin (digest) ON DELETE CASCADE,
    leaf BLOB NOT NULL REFERENCES block (digest) ON DELETE CASCADE,
    PRIMARY KEY (root, leaf)
) WITHOUT ROWID;
CREATE INDEX pinned_below_by_leaf ON pinned_below (leaf);
CREATE TRIGGER pin_added AFTER INSERT ON pin BEGIN
    UPDATE block SET pinned = 1 WHERE digest = NEW.digest;
END;
CREATE TRIGGER pinned_below_added AFTER INSERT ON pinned_below BEGIN
    UPDATE block SET pinned = 1 WHERE digest = NEW.leaf;
END;
CREATE TRIGGER pin_deleted AFTER DELETE ON pin BEGIN
    UPDATE block SET pinned = 0 WHERE digest = OLD.digest
        AND NOT EXISTS (SELECT 1 FROM pinned_below WHERE leaf = OLD.digest);
END;
CREATE TRIGGER pinned_below_deleted AFTER DELETE ON pinned_below BEGIN
    UPDATE block SET pinned = 0 WHERE digest = OLD.leaf
        AND NOT EXISTS (SELECT 1 FROM pin WHERE digest = OLD.leaf)
        AND NOT EXISTS (SELECT 1 FROM pinned_below WHERE leaf = OLD.leaf);
END;

-- Which answers there are to a key.
CREATE TABLE answer (
    key BLOB NOT NULL,
    digest BLOB NOT NULL REFERENCES block (digest) ON DELETE CASCADE,
    model TEXT NOT NULL,
    weights TEXT,
    source TEXT NOT NULL,              -- the peer that computed it
    own INTEGER NOT NULL,              -- computed here
    claimed INTEGER NOT NULL,          -- how many peers claimed it when it was fetched
    namespace TEXT NOT NULL,
    shared INTEGER NOT NULL,           -- may leave this node
    tokens INTEGER NOT NULL,
    size INTEGER NOT NULL,
    seconds REAL,                      -- that computing it took; NULL: not known
    money REAL,                        -- that computing it cost, in US dollars; NULL: not known
    hits INTEGER NOT NULL DEFAULT 0,
    stored_at REAL NOT NULL,
    expires_at REAL NOT NULL,
    PRIMARY KEY (key, digest)
) WITHOUT ROWID;
CREATE INDEX answer_by_digest ON answer (digest);
CREATE INDEX answer_by_expiry ON answer (expires_at);

-- What all of them have together, so that nobody has to count them. How requests were answered, and
-- what that saved, is of all time (`cache.uses`).
CREATE TABLE total (
    blocks INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0,
    pinned_bytes INTEGER NOT NULL DEFAULT 0,
    answers INTEGER NOT NULL DEFAULT 0,
    hits_local INTEGER NOT NULL DEFAULT 0,
    hits_mesh INTEGER NOT NULL DEFAULT 0,
    coalesced INTEGER NOT NULL DEFAULT 0,
    misses INTEGER NOT NULL DEFAULT 0,
    bypassed INTEGER NOT NULL DEFAULT 0,
    tokens_saved INTEGER NOT NULL DEFAULT 0,
    seconds_saved REAL NOT NULL DEFAULT 0,
    money_saved REAL NOT NULL DEFAULT 0
);
INSERT INTO total DEFAULT VALUES;
CREATE TRIGGER block_added AFTER INSERT ON block BEGIN
    UPDATE total SET blocks = blocks + 1, bytes = bytes + NEW.size;
END;
CREATE TRIGGER block_deleted AFTER DELETE ON block BEGIN
    UPDATE total SET blocks = blocks - 1, bytes = bytes - OLD.size,
        pinned_bytes = pinned_bytes - OLD.pinned * OLD.size;
END;
CREATE TRIGGER block_pinned AFTER UPDATE OF pinned ON block BEGIN
    UPDATE total SET pinned_bytes = pinned_bytes + (NEW.pinned - OLD.pinned) * NEW.size;
END;
CREATE TRIGGER answer_added AFTER INSERT ON answer BEGIN
    UPDATE total SET answers = answers + 1;
END;
CREATE TRIGGER answer_deleted AFTER DELETE ON answer BEGIN
    UPDATE total SET answers = answers - 1;
    DELETE FROM block WHERE digest = OLD.digest AND NOT pinned AND NOT put
        AND NOT EXISTS (SELECT 1 FROM answer WHERE digest = OLD.digest);
END;
CREATE TRIGGER link_deleted AFTER DELETE ON link BEGIN
    DELETE FROM block WHERE digest = OLD.root;
    DELETE FROM block WHERE digest = OLD.leaf AND NOT pinned AND NOT put
        AND NOT EXISTS (SELECT 1 FROM link WHERE leaf = OLD.leaf);
END;

-- Who claims, and the newest epoch of that peer's numbers.
CREATE TABLE publisher (
    id INTEGER PRIMARY KEY,
    peer TEXT NOT NULL UNIQUE,
    epoch INTEGER NOT NULL
);
-- The signed batches as they came, to be passed on.
CREATE TABLE batch (
    publisher INTEGER NOT NULL REFERENCES publisher (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    entries INTEGER NOT NULL,
    envelope BLOB NOT NULL,
    PRIMARY KEY (publisher, number)
);
CREATE INDEX batch_by_expiry ON batch (expires_at);
-- What the live batches of others say.
CREATE TABLE claim (
    key BLOB NOT NULL,
    publisher INTEGER NOT NULL REFERENCES publisher (id) ON DELETE CASCADE,
    cid BLOB NOT NULL,
    size INTEGER NOT NULL,
    made_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    held INTEGER NOT NULL,             -- a copy of somebody else's answer
    number INTEGER NOT NULL,           -- of the batch that says so
    PRIMARY KEY (key, publisher, cid)
) WITHOUT ROWID;
CREATE INDEX claim_by_expiry ON claim (expires_at);
CREATE INDEX claim_by_batch ON claim (publisher, number);
-- Who lost its say for long, and until when (s; null: for ever); of a lie the two envelopes.
CREATE TABLE offence (
    peer TEXT PRIMARY KEY,
    offence TEXT NOT NULL,
    until REAL,
    first BLOB,
    second BLOB
) WITHOUT ROWID;
-- How far this node's own batches are numbered.
CREATE TABLE numbering (epoch INTEGER NOT NULL, number INTEGER NOT NULL);
"""
