package ledger

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/failpoint"
)

// segment is what the log in the file begins with.
type segment struct {
	first   uint64      // its first event
	archive RotatedData // where what came before is; zero: nothing did
	began   int64       // when, in nanoseconds since 1970
}

// RotatedData is the Data of ledger.rotated.
type RotatedData struct {
	Ledger uuid.UUID `json:"ledger"`
	Epoch  uint64    `json:"epoch"`
	// Wall is the latest wall time on record.
	Wall time.Time `json:"wall"`
	// Anchor ties the boot in which it was rotated to the wall clock.
	Anchor HighwaterData `json:"anchor,omitzero"`
	// Archive is the name of the file with the events from First to Last.
	Archive   string `json:"archive"`
	First     uint64 `json:"first"`
	FirstHash Hash   `json:"first_hash"`
	Last      uint64 `json:"last"`
	LastHash  Hash   `json:"last_hash"`
	// KeysSeq is the event that last changed what keys are worth; 0: none did.
	KeysSeq uint64 `json:"keys_seq,omitempty"`
	// Carried is how many events of what is in force follow.
	Carried int `json:"carried"`
}

// Segment is what the log in the file begins with, and where it ends.
type Segment struct {
	First, Last uint64      // events
	Archive     RotatedData // what came before it; zero: nothing did
	Began       time.Time   // when it did, where something came before
}

// Segment is the one that is written now.
func (l *Ledger) Segment() Segment {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.root.segment()
}

func (l *layer) segment() Segment {
	m := &l.meta
	return Segment{m.segment.first, m.seq, m.segment.archive, nanoTime(m.segment.began)}
}

// borrowSegment is borrow with the segment that is in the store.
func (l *Ledger) borrowSegment() (*store, Segment, error) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.store == nil {
		return nil, Segment{}, ErrClosed
	}
	l.store.reading.Add(1)
	return l.store, l.root.segment(), nil
}

// Recorded is how many events it has beyond those that it began with.
func (s Segment) Recorded() uint64 {
	began := uint64(1)
	if s.Archive.Archive != "" {
		began += uint64(s.Archive.Carried)
	}
	return s.Last - s.First + 1 - began
}

// untouched tells whether it has nothing but what it began with.
func (s Segment) untouched() bool {
	return s.Archive.Archive != "" && s.Recorded() == 0
}

func (f *folder) rotated(l *layer, e *entry) error {
	d, err := read[RotatedData](e)
	if err != nil {
		return err
	}
	if d.Epoch == 0 || d.Ledger == uuid.Nil || d.Carried < 0 || d.First == 0 || d.First > d.Last {
		return fmt.Errorf("%w: a segment without an id, an epoch or an archive", ErrInvalidEvent)
	}
	if d.Last != e.Seq-1 || d.LastHash != e.Prev {
		return fmt.Errorf("%w: what is archived ends at event %d, and the segment begins with %d", ErrIllegalMove, d.Last, e.Seq)
	}
	l.meta.ledger, l.meta.epoch, l.meta.carrying = d.Ledger, d.Epoch, d.Carried
	l.meta.highwater, l.meta.keysSeq = d.Wall.UnixNano(), d.KeysSeq
	l.meta.segment = segment{e.Seq, d, e.Time.UnixNano()}
	l.mark(d.Anchor)
	return nil
}

// ErrNothingToRotate: nothing was recorded since the last rotation.
var ErrNothingToRotate = errors.New("nothing was recorded since the audit was rotated")

// ErrRotating: a rotation is under way.
var ErrRotating = errors.New("the audit is being rotated")

// Rotation is what came of one.
type Rotation struct {
	Archive ArchiveName
	Bytes   int64         // of the archive
	Grants  int           // that were carried into the new segment
	Blocked time.Duration // for how long nothing else could be recorded
}

// Rotate puts all events into an archive and begins a new segment with what is in
// force. Sequence numbers and the chain go on. The archive is whole and durable
// before anything is taken out of the ledger, and that is one transaction. Most of
// the archive is written beside the ledger's writer.
//
// It fails with ErrNothingToRotate, with ErrRotating, and as Update does.
func (l *Ledger) Rotate(ctx context.Context, by Actor) (r Rotation, err error) {
	if l.o.ReadOnly {
		return r, ErrReadOnly
	}
	if !l.rotating.TryLock() {
		return r, ErrRotating
	}
	defer l.rotating.Unlock()
	if l.Segment().untouched() {
		return r, ErrNothingToRotate
	}
	a, err := newArchive(ctx, l.o.Dir)
	if err != nil {
		return r, fmt.Errorf("%w: %w", ErrNotRecorded, err)
	}
	defer func() {
		if err != nil {
			if gone := a.drop(); gone != nil {
				l.o.Log.Warn("cannot remove an archive that is not finished", "err", gone)
			}
		}
	}()
	failpoint.Hit("ledger.archive.begun")
	// What takes long is done beside the writer, and given back before it is waited
	// for: whoever leads it may wait for the readers.
	s, head, err := l.borrow()
	if err != nil {
		return r, err
	}
	err = a.add(ctx, s, head)
	s.reading.Done()
	if err != nil {
		return r, fmt.Errorf("%w: %w", ErrNotRecorded, err)
	}
	failpoint.Hit("ledger.archive.copied")
	err = l.run(ctx, &update{alone: func() (err error) {
		began := time.Now()
		r, err = l.rotate(ctx, a, by)
		r.Blocked = time.Since(began)
		return err
	}})
	if err != nil {
		return r, err
	}
	l.wake()
	l.supersede(r.Archive)
	return r, nil
}

// rotate is the part for which nobody else writes.
func (l *Ledger) rotate(ctx context.Context, a *archive, by Actor) (r Rotation, err error) {
	if err := l.Poisoned(); err != nil {
		return r, fmt.Errorf("%w: %w", ErrPoisoned, err)
	}
	// Nobody but who leads gives the ledger another store. It may have one since the
	// archive was begun; the chain tells whether it is the same log.
	head, hash := l.Head()
	if head > a.chain.last {
		if err := a.add(ctx, l.store, head); err != nil {
			return r, fmt.Errorf("%w: %w", ErrNotRecorded, err)
		}
	}
	if a.chain.last != head || a.chain.hash != hash {
		return r, fmt.Errorf("%w: the ledger ends with event %d, and the archive with another, %d", ErrNotRecorded, head, a.chain.last)
	}
	first, err := l.store.hashOf(ctx, a.chain.first)
	if err != nil {
		return r, fmt.Errorf("%w: cannot read the first event: %w", ErrNotRecorded, err)
	}
	if r.Archive, err = a.finish(); err != nil {
		return r, fmt.Errorf("%w: %w", ErrNotRecorded, err)
	}
	// The mark's event is what the new segment is bound to: an older one would be
	// taken for one of another ledger, now that it is not in the database.
	if l.Marked() {
		if err := l.mark(); err != nil {
			return r, fmt.Errorf("%w: %w", ErrNotRecorded, err)
		}
	}
	path := filepath.Join(a.dir, r.Archive.Name)
	n, err := l.nextSegment(r.Archive, first, by)
	if err == nil {
		var begun bool
		begun, err = l.replace(n)
		if begun && err != nil {
			// Which of the two is on the disk is not known; both may be needed.
			return r, err
		}
	}
	if err != nil {
		return r, errors.Join(err, os.Remove(path))
	}
	if info, err := os.Stat(path); err == nil {
		r.Bytes = info.Size()
	}
	r.Grants = int(n.root.len())
	return r, nil
}

func (s *store) hashOf(ctx context.Context, seq uint64) (h Hash, err error) {
	var stored []byte
	err = s.readers.QueryRowContext(ctx, "SELECT hash FROM events WHERE seq = ?", int64(seq)).Scan(&stored)
	copy(h[:], stored)
	return h, err
}

// newSegment is one that is not yet written.
type newSegment struct {
	records []record
	events  []Event
	root    *layer
	folder  *folder
}

// nextSegment is what follows the archive: its state is folded from its events, as
// it will be when they are loaded.
func (l *Ledger) nextSegment(a ArchiveName, firstHash Hash, by Actor) (*newSegment, error) {
	now := (&State{l.root, l.o.Kinds}).Effective(l.o.Clock.Now())
	old := l.root.meta
	carried := l.root.carried()
	n := &newSegment{root: newLayer(nil), folder: &folder{newInterner()}}
	n.root.due = &deadlines{bootID: l.root.due.bootID}
	n.root.meta.seq, n.root.meta.hash = old.seq, old.hash
	add := func(t EventType, kind byte, data []byte) error {
		m := &n.root.meta
		e := Event{Seq: m.seq + 1, Prev: m.hash, Time: now.Wall.UTC().Round(0), Type: t, Actor: by}
		body := encodeEvent(nil, &e, kind, data)
		var stored entry
		if err := decodeEvent(body, &stored); err != nil {
			return err
		}
		hash := hashRecord(body)
		v, err := stored.public(hash)
		if err != nil {
			return err
		}
		if err := n.folder.fold(n.root, &stored); err != nil {
			return err
		}
		m.seq, m.hash = e.Seq, hash
		n.records = append(n.records, record{e.Seq, body, hash})
		n.events = append(n.events, v)
		return nil
	}
	var anchor HighwaterData
	if m := old.anchor; m.set {
		anchor = HighwaterData{Wall: nanoTime(m.wall), BootID: l.root.due.bootID, Boot: nanoDuration(m.boot)}
	}
	err := add(LedgerRotated, dataJSON, mustJSON(RotatedData{
		Ledger: old.ledger, Epoch: old.epoch, Wall: nanoTime(old.highwater), Anchor: anchor, Archive: a.Name,
		First: a.First, FirstHash: firstHash, Last: old.seq, LastHash: old.hash, KeysSeq: old.keysSeq, Carried: len(carried),
	}))
	for _, data := range carried {
		if err == nil {
			err = add(LedgerCarried, dataCarried, data)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w: what is in force cannot be carried: %w", ErrNotRecorded, err)
	}
	n.root.unlink()
	n.root.due.prune(n.root)
	n.root.meta.boot = int64(now.Boot)
	return n, nil
}

// replace writes a segment in the place of the one before.
func (l *Ledger) replace(n *newSegment) (begun bool, err error) {
	began := time.Now()
	if begun, err = l.store.rewrite(n.records); err == nil {
		err, begun = l.store.present(), true
	}
	failed := &update{}
	if err != nil {
		l.failed([]*update{failed}, begun, err)
		err = failed.err
	} else {
		l.mu.Lock()
		l.root, l.folder = n.root, n.folder
		l.mu.Unlock()
		l.store.frames.Add(framesOf(n.records))
		failpoint.Hit("ledger.rotate.after")
	}
	l.observe(time.Since(began), []*update{{events: n.events}}, err)
	return begun, err
}

// supersede removes archives of which a newer one has all: those of rotations that
// were broken off after their archive was finished.
func (l *Ledger) supersede(by ArchiveName) {
	all, err := Archives(l.o.Dir)
	if err != nil {
		l.o.Log.Warn("cannot look for archives that are not needed", "err", err)
		return
	}
	for _, a := range all {
		if a.Name == by.Name || a.First != by.First || a.Last >= by.Last {
			continue
		}
		if err := l.covered(a, by); err != nil {
			l.o.Log.Warn("an archive is left alone", "name", a.Name, "why", err)
		}
	}
}

func (l *Ledger) covered(a, by ArchiveName) error {
	dir := filepath.Join(l.o.Dir, ArchiveDir)
	s, err := openArchive(l.ctx, filepath.Join(dir, by.Name))
	if err != nil {
		return err
	}
	defer s.close()
	hash, err := s.hashOf(l.ctx, a.Last)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(hash.String(), a.hash) {
		return errors.New("it is of another chain")
	}
	return os.Remove(filepath.Join(dir, a.Name))
}
