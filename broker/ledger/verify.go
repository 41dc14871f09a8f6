package ledger

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Anchor is an event known from elsewhere.
type Anchor struct {
	Seq  uint64 `json:"seq"`
	Hash Hash   `json:"hash"`
}

func (a Anchor) String() string { return fmt.Sprintf("%d:%s", a.Seq, a.Hash) }

// ParseAnchor reads what String writes.
func ParseAnchor(s string) (a Anchor, err error) {
	seq, hash, ok := strings.Cut(s, ":")
	if a.Seq, err = strconv.ParseUint(seq, 10, 63); !ok || err != nil || a.Seq == 0 {
		return Anchor{}, fmt.Errorf("%q is no anchor: that is an event's number and its hash, as in 1200:3f0c…", s)
	}
	if err := a.Hash.UnmarshalText([]byte(hash)); err != nil {
		return Anchor{}, fmt.Errorf("%q is no anchor: %w", s, err)
	}
	return a, nil
}

// chain checks one event after another.
type chain struct {
	events      int
	first, last uint64 // of those that hold
	hash        Hash   // of the last
	firstHash   Hash
	known       map[uint64]Hash
	met         int // anchors that are part of it

	folder *folder
	layer  *layer // nil: links are checked, not what they say
	// began is what the segment began with, where wantBegan asks for it.
	wantBegan bool
	began     [][]byte

	witness *witness // nil: nothing else is looked for

	e entry
}

func newChain(anchors []Anchor) *chain {
	c := &chain{known: map[uint64]Hash{}}
	for _, a := range anchors {
		c.known[a.Seq] = a.Hash
	}
	return c
}

// add checks that an event follows the one before. claim is the hash that is
// stored with it, where that is another than its hash.
func (c *chain) add(seq uint64, body []byte, hash Hash, claim []byte) error {
	broken := func(problem, format string, args ...any) error {
		return &ChainError{Seq: seq, Problem: problem, Detail: fmt.Sprintf(format, args...)}
	}
	if c.events == 0 && c.layer != nil && seq > 1 && typeOf(body) == LedgerRotated {
		// A segment begins here. That it follows what it says is for whoever has that.
		c.last = seq - 1
		if err := decodeEvent(body, &c.e); err == nil {
			c.hash = c.e.Prev
		}
		// The event before it is known by that link.
		if want, ok := c.known[c.last]; ok && want == c.hash {
			delete(c.known, c.last)
			c.met++
		}
	}
	if seq != c.last+1 {
		return broken(BrokenGap, "the event before it is %d", c.last)
	}
	if claim != nil {
		return broken(BrokenHash, "its content hashes to %s, and it says %x", hash, claim)
	}
	// The entry's slices live in the body; what the fold keeps, it copies.
	if err := decodeEvent(body, &c.e); err != nil {
		return broken(BrokenUndecodable, "%v", err)
	}
	if c.e.Seq != seq {
		return broken(BrokenUndecodable, "it says that it is event %d", c.e.Seq)
	}
	if c.e.Prev != c.hash {
		return broken(BrokenPrev, "it follows %s, and the event before it is %s", c.e.Prev, c.hash)
	}
	if c.layer != nil {
		if err := c.folder.fold(c.layer, &c.e); err != nil {
			return broken(BrokenIllegal, "%v", err)
		}
		c.layer.meta.seq, c.layer.meta.hash = seq, hash
		if at := &c.layer.meta; c.wantBegan && at.segment.archive.Archive != "" && at.carrying == 0 {
			c.began, c.wantBegan = c.layer.carried(), false
		}
	}
	if want, ok := c.known[seq]; ok {
		if want != hash {
			return broken(BrokenAnchor, "it is %s, and %s was anchored", hash, want)
		}
		delete(c.known, seq)
		c.met++
	}
	c.witness.see(&c.e, hash)
	if c.events++; c.first == 0 {
		c.first, c.firstHash = seq, hash
	}
	c.last, c.hash = seq, hash
	return nil
}

// all adds all stored rows.
func (c *chain) all(ctx context.Context, s *store) error {
	err := eachHashed(ctx, s, func(r *storedRow, body []byte) error {
		return c.add(uint64(max(r.seq, 0)), body, r.hash, r.claim)
	})
	if _, ok := errors.AsType[*ChainError](err); ok || err == nil {
		return err
	}
	switch {
	case ctx.Err() != nil:
		err = ctx.Err()
	case !transient(err):
		return &ChainError{Seq: c.last + 1, Problem: BrokenUnreadable, Detail: err.Error()}
	}
	return fmt.Errorf("cannot read the ledger: %w", err)
}

// end wants all that a segment begins with, and all anchors to be met.
func (c *chain) end() error {
	if err := c.complete(); err != nil {
		return err
	}
	if len(c.known) == 0 {
		return nil
	}
	seq := slices.Min(slices.Collect(maps.Keys(c.known)))
	if seq < c.first {
		return &ChainError{Seq: seq, Problem: BrokenAnchor, Detail: fmt.Sprintf("it was anchored, and what is verified begins at event %d", c.first)}
	}
	return &ChainError{Seq: seq, Problem: BrokenAnchor, Detail: fmt.Sprintf("it was anchored, and the ledger ends at %d", c.last)}
}

// complete wants all that a segment begins with.
func (c *chain) complete() error {
	if c.layer != nil && c.layer.meta.carrying > 0 {
		return &ChainError{Seq: c.last + 1, Problem: BrokenGap, Detail: fmt.Sprintf("%d events of what is in force at its beginning are missing", c.layer.meta.carrying)}
	}
	return nil
}

func (c *chain) report(err error) (VerifyReport, error) {
	r := VerifyReport{Events: c.events, First: c.first, Last: c.last, Head: c.hash, Anchors: c.met}
	if c.layer != nil {
		r.Ledger, r.Epoch = c.layer.meta.ledger, c.layer.meta.epoch
	}
	if broken, ok := errors.AsType[*ChainError](err); ok {
		r.Broken, err = broken, nil
	}
	return r, err
}
