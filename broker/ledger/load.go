package ledger

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	sqlite3 "modernc.org/sqlite/lib"
)

// rowBatch carries rows from the goroutine that reads and hashes them to the
// one that folds them.
type rowBatch struct {
	rows   []storedRow
	bodies []byte
	err    error // after the rows
}

type storedRow struct {
	seq   int64
	end   int    // of its body in bodies
	hash  Hash   // of its body
	claim []byte // the stored hash, where it is another
}

const rowsPerBatch = 512

// readRows sends all stored rows, in order.
func readRows(ctx context.Context, s *store, out chan<- *rowBatch) {
	defer close(out)
	b := &rowBatch{}
	send := func() error {
		select {
		case out <- b:
			b = &rowBatch{rows: make([]storedRow, 0, rowsPerBatch), bodies: make([]byte, 0, len(b.bodies)+len(b.bodies)/8)}
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	err := s.each(ctx, math.MinInt64, func(seq int64, body, stored []byte) error {
		b.bodies = append(b.bodies, body...)
		r := storedRow{seq: seq, end: len(b.bodies), hash: hashRecord(body)}
		if !bytes.Equal(r.hash[:], stored) {
			r.claim = append([]byte{}, stored...)
		}
		if b.rows = append(b.rows, r); len(b.rows) == rowsPerBatch {
			return send()
		}
		return nil
	})
	b.err = err
	_ = send() // where it cannot, nobody listens
}

// eachHashed calls fn with every stored row, in order, while the next ones are
// read and hashed.
func eachHashed(ctx context.Context, s *store, fn func(r *storedRow, body []byte) error) error {
	ctx, cancel := context.WithCancel(ctx)
	ch := make(chan *rowBatch, 4)
	go readRows(ctx, s, ch)
	defer func() {
		cancel()
		for range ch { // until the reader is gone
		}
	}()
	for b := range ch {
		start := 0
		for i := range b.rows {
			r := &b.rows[i]
			if err := fn(r, b.bodies[start:r.end:r.end]); err != nil {
				return err
			}
			start = r.end
		}
		if b.err != nil {
			return b.err
		}
	}
	return ctx.Err()
}

// load folds all stored events into l and checks every link. A broken chain is
// a *ChainError.
func load(ctx context.Context, s *store, f *folder, l *layer, anchors ...Anchor) (events int, err error) {
	known := map[uint64]Hash{}
	for _, a := range anchors {
		known[a.Seq] = a.Hash
	}
	var e entry
	err = eachHashed(ctx, s, func(r *storedRow, body []byte) error {
		seq := uint64(max(r.seq, 0))
		broken := func(problem, format string, args ...any) error {
			return &ChainError{Seq: seq, Problem: problem, Detail: fmt.Sprintf(format, args...)}
		}
		if seq != l.meta.seq+1 {
			return broken(BrokenGap, "the event before it is %d", l.meta.seq)
		}
		hash := r.hash
		if r.claim != nil {
			return broken(BrokenHash, "its content hashes to %s, and it says %x", hash, r.claim)
		}
		// The entry's slices live in the batch; what the fold keeps, it copies.
		if err := decodeEvent(body, &e); err != nil {
			return broken(BrokenUndecodable, "%v", err)
		}
		if e.Seq != seq {
			return broken(BrokenUndecodable, "it says that it is event %d", e.Seq)
		}
		if e.Prev != l.meta.hash {
			return broken(BrokenPrev, "it follows %s, and the event before it is %s", e.Prev, l.meta.hash)
		}
		if err := f.fold(l, &e); err != nil {
			return broken(BrokenIllegal, "%v", err)
		}
		if want, ok := known[seq]; ok {
			if want != hash {
				return broken(BrokenAnchor, "it is %s, and %s was anchored", hash, want)
			}
			delete(known, seq)
		}
		l.meta.seq, l.meta.hash = seq, hash
		events++
		return nil
	})
	if _, ok := errors.AsType[*ChainError](err); err != nil && !ok {
		switch {
		case ctx.Err() != nil:
			err = ctx.Err()
		case !transient(err):
			return events, &ChainError{Seq: l.meta.seq + 1, Problem: BrokenUnreadable, Detail: err.Error()}
		}
		return events, fmt.Errorf("cannot read the ledger: %w", err)
	}
	if err != nil {
		return events, err
	}
	l.unlink()
	if l.meta.seq == 0 {
		return events, &ChainError{Seq: 1, Problem: BrokenGap, Detail: "a ledger is made with its first event, and that is missing"}
	}
	if len(known) > 0 {
		seq := slices.Min(slices.Collect(maps.Keys(known)))
		return events, &ChainError{Seq: seq, Problem: BrokenAnchor, Detail: fmt.Sprintf("it was anchored, and the ledger ends at %d", l.meta.seq)}
	}
	return events, nil
}

// transient are the failures that say nothing about the file: somebody locks
// it, or memory or descriptors are short.
func transient(err error) bool {
	switch sqliteCode(err) {
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT,
		sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL:
		return true
	}
	return false
}

// Anchor is an event known from elsewhere.
type Anchor struct {
	Seq  uint64 `json:"seq"`
	Hash Hash   `json:"hash"`
}

// VerifyReport is what Verify found.
type VerifyReport struct {
	Events int         // that are whole, from the first
	Head   Hash        // of the last of them
	Broken *ChainError // the first broken link; nil: none
}

// Verify checks the whole chain in dir, and that the events in anchors are
// part of it. It changes no event and may run beside a broker. Cut-off newest
// events leave a valid chain: only an anchor shows them. A copy made while a
// broker ran needs the "-wal" file beside the database, or lacks its newest
// events.
func Verify(ctx context.Context, dir string, anchors ...Anchor) (VerifyReport, error) {
	if _, err := os.Stat(filepath.Join(dir, fileName)); err != nil {
		return VerifyReport{}, fmt.Errorf("there is no ledger to verify: %w", err)
	}
	s, err := openStore(ctx, dir, true, "", time.Time{})
	if err != nil {
		return VerifyReport{}, err
	}
	defer s.close()
	l := newLayer(nil)
	n, err := load(ctx, s, &folder{newInterner()}, l, anchors...)
	r := VerifyReport{Events: n, Head: l.meta.hash}
	if broken, ok := errors.AsType[*ChainError](err); ok {
		r.Broken, err = broken, nil
	}
	return r, err
}
