package ledger

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/uuid"
)

// EventFilter selects events; a zero field selects all.
type EventFilter struct {
	VM           uuid.UUID // as the event's VM, or as its actor
	Grant        uuid.UUID
	Partition    uuid.UUID
	Types        []EventType
	Actor        ActorFilter
	Since, Until time.Time // Since inclusive, Until exclusive
	// Also has the last word on what the other fields select.
	Also func(Event) bool
}

// ActorFilter selects actors; a zero field selects all.
type ActorFilter struct {
	Kind string
	UID  *uint32
	VM   uuid.UUID
}

func (f ActorFilter) match(a *Actor) bool {
	return (f.Kind == "" || f.Kind == a.Kind) &&
		(f.UID == nil || a.UID != nil && *f.UID == *a.UID) &&
		(f.VM == uuid.Nil || f.VM == a.VM)
}

func (f EventFilter) match(e *Event) bool {
	return (f.VM == uuid.Nil || f.VM == e.VM || f.VM == e.Actor.VM) &&
		(f.Grant == uuid.Nil || f.Grant == e.Grant) &&
		(f.Partition == uuid.Nil || f.Partition == e.Partition) &&
		(len(f.Types) == 0 || slices.Contains(f.Types, e.Type)) &&
		f.Actor.match(&e.Actor) &&
		(f.Since.IsZero() || !e.Time.Before(f.Since)) &&
		(f.Until.IsZero() || e.Time.Before(f.Until))
}

// Reading says which part of the log to read. What bounds a page bounds how long
// it takes: a filter that hardly anything matches is read page by page too.
type Reading struct {
	After   uint64 // the cursor: only events behind it
	Filter  EventFilter
	Limit   int  // at most so many events; 0: all
	Scan    int  // look at no more than so many; 0: at all
	Bytes   int  // end the page when the records in it reach so much; 0: never
	Records bool // with their records
}

// Page is what a Reading found, in order.
type Page struct {
	Events  []Event
	Records [][]byte // the event's as it is hashed, where asked for
	Next    uint64   // the cursor for the page behind this one
	More    bool     // there are events behind Next
	Gap     *Gap     // events behind the cursor that are not in the ledger any more
}

// Gap are events that are in archives.
type Gap struct {
	First, Last uint64
	Archives    []ArchiveName // those that are there and hold some of them, oldest first
	Missing     bool          // some of them are in no archive that is there
	Rotated     time.Time     // when the last of them went there
}

var errPageFull = errors.New("the page is full")

// Read returns committed events. Each is checked against its hash and against the
// event before it: what is not as it was loaded ends all writing. Where the cursor
// is before the first event that is still in the ledger, the page says so, and goes
// on with that one. It fails with ErrBeyondHead where the cursor is behind the
// newest event: it is another ledger's.
func (l *Ledger) Read(ctx context.Context, r Reading) (Page, error) {
	for {
		newest := l.head()
		s, seg, err := l.borrowSegment()
		if err != nil {
			return Page{}, err
		}
		p, err := l.readSegment(ctx, s, seg, newest, r)
		s.reading.Done()
		if err != nil && ctx.Err() == nil && l.rotatedSince(seg) {
			continue // under this reader
		}
		return p, l.noticed(err)
	}
}

// rotatedSince tells whether the segment is not the one that is written any more,
// once a rotation that is under way has ended.
func (l *Ledger) rotatedSince(seg Segment) bool {
	l.rotating.Lock()
	defer l.rotating.Unlock()
	return l.Segment().First != seg.First
}

func (l *Ledger) readSegment(ctx context.Context, s *store, seg Segment, newest Anchor, r Reading) (Page, error) {
	if r.After > seg.Last {
		return Page{}, fmt.Errorf("%w: it ends at event %d, and the cursor is %d", ErrBeyondHead, seg.Last, r.After)
	}
	gap, err := l.gap(seg, r)
	if err != nil {
		return Page{}, err
	}
	r.After = max(r.After, seg.First-1)
	link := links{from: r.After, newest: newest}
	if before := seg.Archive; r.After == before.Last {
		link.prev, link.known = before.LastHash, before.Archive != ""
	}
	p, err := s.page(ctx, r, seg.Last, link)
	p.Gap = gap
	return p, err
}

// gap is what a reader asks for and is in archives, or nil.
func (l *Ledger) gap(seg Segment, r Reading) (*Gap, error) {
	if r.After+1 >= seg.First || !r.Filter.Since.IsZero() && !r.Filter.Since.Before(seg.Began) {
		return nil, nil //nolint:nilnil // there is none
	}
	g := &Gap{First: r.After + 1, Last: seg.First - 1, Rotated: seg.Began}
	all, err := Archives(l.o.Dir)
	if err != nil {
		return nil, err
	}
	next := g.First
	for _, a := range all {
		if a.Last >= g.First && a.First <= g.Last {
			g.Archives = append(g.Archives, a)
			if a.First <= next {
				next = max(next, a.Last+1)
			}
		}
	}
	g.Missing = next <= g.Last
	return g, nil
}

// page reads events up to head, which follow link.
func (s *store) page(ctx context.Context, r Reading, head uint64, link links) (Page, error) {
	p := Page{Next: r.After}
	if r.After >= head {
		return p, nil
	}
	bytes, looked := 0, 0
	err := s.each(ctx, int64(r.After), func(row int64, body, stored []byte) error {
		seq := uint64(row)
		if seq == r.After {
			return link.begin(body, stored)
		}
		if seq != p.Next+1 {
			return &ChainError{Seq: p.Next + 1, Problem: BrokenGap, Detail: "it is gone since it was loaded"}
		}
		e, hash, err := checkRow(seq, body, stored)
		if err != nil {
			return err
		}
		if err := link.follow(&e.Event, hash); err != nil {
			return err
		}
		p.Next = seq
		if r.Filter.match(&e.Event) {
			v, err := e.public(hash)
			if err != nil {
				return &ChainError{Seq: seq, Problem: BrokenUndecodable, Detail: err.Error()}
			}
			if r.Filter.Also == nil || r.Filter.Also(v) {
				p.Events = append(p.Events, v)
				bytes += len(body)
				if r.Records {
					p.Records = append(p.Records, slices.Clone(body))
				}
			}
		}
		looked++
		if seq == head || r.Limit > 0 && len(p.Events) >= r.Limit || r.Scan > 0 && looked >= r.Scan || r.Bytes > 0 && bytes >= r.Bytes {
			return errPageFull
		}
		return nil
	})
	if err == nil {
		err = &ChainError{Seq: p.Next + 1, Problem: BrokenGap, Detail: "it is gone since it was loaded"}
	}
	if !errors.Is(err, errPageFull) {
		return Page{}, fmt.Errorf("cannot read the ledger's events: %w", err)
	}
	p.More = p.Next < head
	return p, nil
}

// checkRow decodes a row that was loaded before.
func checkRow(seq uint64, body, stored []byte) (*entry, Hash, error) {
	var e entry
	hash := hashRecord(body)
	if string(hash[:]) != string(stored) {
		return nil, hash, &ChainError{Seq: seq, Problem: BrokenHash, Detail: "it was changed since it was loaded"}
	}
	if err := decodeEvent(body, &e); err != nil {
		return nil, hash, &ChainError{Seq: seq, Problem: BrokenUndecodable, Detail: err.Error()}
	}
	if e.Seq != seq {
		return nil, hash, &ChainError{Seq: seq, Problem: BrokenUndecodable, Detail: fmt.Sprintf("it says that it is event %d", e.Seq)}
	}
	return &e, hash, nil
}

// Events are committed events after the given sequence number that f selects,
// in order, at most limit of them (0: all).
func (l *Ledger) Events(after uint64, f EventFilter, limit int) ([]Event, error) {
	p, err := l.Read(context.Background(), Reading{After: after, Filter: f, Limit: limit})
	if errors.Is(err, ErrBeyondHead) {
		return nil, nil
	}
	return p.Events, err
}

// Commit tells of one transaction that was written, or could not be.
type Commit struct {
	Took   time.Duration // writing it and making it durable
	Events []Event       // of all Updates that shared it; none where it failed
	Err    error
}

// observe tells of a commit whoever wants to know.
func (l *Ledger) observe(took time.Duration, batch []*update, err error) {
	if l.o.Observe == nil {
		return
	}
	c := Commit{Took: took, Err: err}
	for _, u := range batch {
		if err == nil && u.err == nil {
			c.Events = append(c.Events, u.events...)
		}
	}
	l.o.Observe(c)
}

// Size is how many bytes the ledger's files take.
func (l *Ledger) Size() (bytes int64) {
	for _, suffix := range []string{"", "-wal"} {
		// What is missing takes nothing.
		if info, err := os.Stat(filepath.Join(l.o.Dir, fileName+suffix)); err == nil {
			bytes += info.Size()
		}
	}
	return bytes
}

// Tally counts the grants that have not ended for good.
type Tally struct {
	States map[GrantState]int
	// OldestRevoking is when the one that is revoking for the longest time was
	// revoked; zero where there is none.
	OldestRevoking time.Time
}

// Tally counts without copying grants: its cost is one look at each.
func (s *State) Tally() Tally {
	t := Tally{States: map[GrantState]int{Pending: 0, Active: 0, Revoking: 0}}
	oldest := int64(0)
	s.l.eachOpen(uuid.Nil, func(_ int32, n *node) bool {
		t.States[n.stateName()]++
		if n.stateName() == Revoking && n.note != nil && n.note.revoking > 0 && (oldest == 0 || n.note.revoking < oldest) {
			oldest = n.note.revoking
		}
		return true
	})
	if oldest > 0 {
		t.OldestRevoking = nanoTime(oldest)
	}
	return t
}
