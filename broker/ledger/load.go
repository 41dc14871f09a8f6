package ledger

import (
	"bytes"
	"context"
	"math"

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
func load(ctx context.Context, s *store, f *folder, l *layer, w *witness, anchors ...Anchor) (events int, err error) {
	c := newChain(anchors)
	c.folder, c.layer, c.witness = f, l, w
	if err := c.all(ctx, s); err != nil {
		return c.events, err
	}
	l.unlink()
	if l.meta.seq == 0 {
		return c.events, &ChainError{Seq: 1, Problem: BrokenGap, Detail: "a ledger is made with its first event, and that is missing"}
	}
	return c.events, c.end()
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
