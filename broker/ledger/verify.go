package ledger

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
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
	known       map[uint64]Hash
	met         int // anchors that are part of it

	folder *folder
	layer  *layer // nil: links are checked, not what they say

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
		c.first = seq
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

// end wants all anchors to be met.
func (c *chain) end() error {
	if len(c.known) == 0 {
		return nil
	}
	seq := slices.Min(slices.Collect(maps.Keys(c.known)))
	if seq < c.first {
		return &ChainError{Seq: seq, Problem: BrokenAnchor, Detail: fmt.Sprintf("it was anchored, and what is verified begins at event %d", c.first)}
	}
	return &ChainError{Seq: seq, Problem: BrokenAnchor, Detail: fmt.Sprintf("it was anchored, and the ledger ends at %d", c.last)}
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

// VerifyReport is what Verify found.
type VerifyReport struct {
	Events      int         // that are whole
	First, Last uint64      // of them
	Head        Hash        // of the last of them
	Anchors     int         // that are part of the chain
	Ledger      uuid.UUID   // which one it is
	Epoch       uint64      // at its end
	Broken      *ChainError // the first broken link; nil: none
}

// Mark is what was found of the ledger as a whole.
func (r *VerifyReport) Mark() Mark { return Mark{r.Ledger, r.Epoch, Anchor{r.Last, r.Head}} }

// Verify checks the whole chain in dir, and that the event that the directory
// itself knows (see Mark) and those in anchors are part of it. It changes no
// event and may run beside a broker. Cut-off newest
// events leave a valid chain: only an anchor shows them. A copy made while a
// broker ran needs the "-wal" file beside the database, or lacks its newest
// events.
func Verify(ctx context.Context, dir string, anchors ...Anchor) (VerifyReport, error) {
	// Before the database: what is marked later is not there yet.
	w, err := newWitness(dir)
	if err == nil {
		err = w.gone(filepath.Join(dir, fileName))
	}
	if err != nil {
		return VerifyReport{}, err
	}
	return verifyFile(ctx, filepath.Join(dir, fileName), w, anchors)
}

// VerifyFile is Verify of a database that is no state directory's, such as a
// backup.
func VerifyFile(ctx context.Context, path string, anchors ...Anchor) (VerifyReport, error) {
	return verifyFile(ctx, path, &witness{}, anchors)
}

func verifyFile(ctx context.Context, path string, w *witness, anchors []Anchor) (VerifyReport, error) {
	s, err := openToVerify(ctx, path)
	if err != nil {
		return VerifyReport{}, err
	}
	defer s.close()
	l := newLayer(nil)
	c := newChain(anchors)
	c.folder, c.layer, c.witness = &folder{newInterner()}, l, w
	if err = c.all(ctx, s); err == nil {
		err = c.end()
	}
	if err == nil && c.events > 0 {
		err = w.judge(&l.meta)
	}
	if swapped, ok := errors.AsType[*SwapError](err); ok {
		err = &ChainError{Seq: w.mark.Seq, Problem: BrokenAnchor, Detail: swapped.Detail}
	}
	if c.events == 0 && err == nil {
		err = &ChainError{Seq: 1, Problem: BrokenGap, Detail: "a ledger is made with its first event, and that is missing"}
	}
	return c.report(err)
}

// VerifyFrom checks the chain from an anchored event to its end, and nothing
// before: that the event is what was anchored, and that each one that follows is
// bound to it. Whether the events before allow those that follow is not looked at.
func VerifyFrom(ctx context.Context, dir string, from Anchor, more ...Anchor) (VerifyReport, error) {
	s, err := openToVerify(ctx, filepath.Join(dir, fileName))
	if err != nil {
		return VerifyReport{}, err
	}
	defer s.close()
	c := newChain(append(more, from))
	err = s.each(ctx, int64(from.Seq), func(row int64, body, stored []byte) error {
		seq, hash := uint64(max(row, 0)), hashRecord(body)
		if c.events == 0 && seq == from.Seq {
			// What it follows is not known, and need not be: the anchor vouches.
			c.last = seq - 1
			var e entry
			if decodeEvent(body, &e) == nil {
				c.hash = e.Prev
			}
		}
		var claim []byte
		if string(hash[:]) != string(stored) {
			claim = stored
		}
		return c.add(seq, body, hash, claim)
	})
	if _, ok := errors.AsType[*ChainError](err); err != nil && !ok && ctx.Err() == nil && !transient(err) {
		err = &ChainError{Seq: c.last + 1, Problem: BrokenUnreadable, Detail: err.Error()}
	}
	switch {
	case err != nil:
	case c.events == 0:
		err = &ChainError{Seq: from.Seq, Problem: BrokenAnchor, Detail: "it was anchored, and is not in the ledger"}
	default:
		err = c.end()
	}
	return c.report(err)
}

func openToVerify(ctx context.Context, path string) (*store, error) {
	if info, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("there is no ledger to verify: %w", err)
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("there is no ledger to verify: %w: %s is not a regular file", ErrNotLedger, path)
	}
	s := &store{}
	if err := s.open(ctx, path, true, "", time.Time{}); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot open the ledger: %w", err), s.close())
	}
	return s, nil
}
