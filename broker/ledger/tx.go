package ledger

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/google/uuid"

	"spectrum-os.org/broker/capabilities"
)

// record is an event as it will be stored.
type record struct {
	seq  uint64
	body []byte
	hash Hash
}

// Tx is one Update under way. It is valid only while its function runs.
type Tx struct {
	ledger  *Ledger
	layer   *layer
	now     capabilities.Instant
	records []record
	events  []Event
}

// State is the committed state with what this Update, and those before it in
// the same commit, have appended.
func (tx *Tx) State() *State { return &State{tx.layer, tx.ledger.o.Kinds} }

// Now is the ledger's clock, no earlier than the high-water mark.
func (tx *Tx) Now() capabilities.Instant { return tx.now }

// Append adds an event. It fails with ErrInvalidEvent, ErrIllegalMove or
// ErrNotCovered, and then adds nothing.
func (tx *Tx) Append(e Event) error {
	l := tx.layer
	e.Seq, e.Prev, e.Time = l.meta.seq+1, l.meta.hash, tx.now.Wall.UTC().Round(0)
	n := entry{Event: e}
	if err := tx.fill(&n); err != nil {
		return err
	}
	body := encodeEvent(nil, &n.Event, n.dataKind, n.data)
	// What is stored is what will be loaded: it is folded from its decoded
	// form, so that nothing can be appended that could not be loaded.
	var stored entry
	if err := decodeEvent(body, &stored); err != nil {
		return fmt.Errorf("%w: %s cannot be stored: %w", ErrInvalidEvent, e.Type, err)
	}
	hash := hashRecord(body)
	before := l.meta.highwater
	if err := tx.ledger.folder.fold(l, &stored); err != nil {
		return err
	}
	if l.meta.highwater > before {
		l.meta.boot = int64(tx.now.Boot)
	}
	l.meta.seq, l.meta.hash = n.Seq, hash
	tx.records = append(tx.records, record{n.Seq, body, hash})
	tx.events = append(tx.events, stored.appended(hash))
	return nil
}

// fill encodes the data of an event, and completes one about a grant.
func (tx *Tx) fill(n *entry) error {
	if !slices.Contains(actorKinds[:], n.Actor.Kind) {
		return fmt.Errorf("%w: an actor of kind %q", ErrInvalidEvent, n.Actor.Kind)
	}
	if n.Type == GrantRequested {
		return tx.fillRequest(n)
	}
	if n.Type == GrantRenewed {
		if err := tx.checkRenewal(n); err != nil {
			return err
		}
	}
	if i, ok := tx.layer.find(n.Grant); ok && n.VM == uuid.Nil {
		about := tx.layer.get(i).about
		n.VM, n.Partition = about.holder, about.partition
	}
	if n.Type == GrantActive || n.Type == GrantUsed {
		// What died with an ancestor is still pending or active where that is not
		// on record of it yet.
		if err := tx.State().Live(n.Grant, tx.now); errors.Is(err, ErrRevoked) || errors.Is(err, ErrFailed) {
			return fmt.Errorf("%w: %s: %w", ErrIllegalMove, n.Type, err)
		}
	}
	data, err := compact(n.Data)
	if err != nil {
		return fmt.Errorf("%w: the data of %s: %w", ErrInvalidEvent, n.Type, err)
	}
	if len(data) > 0 {
		n.dataKind, n.data = dataJSON, data
	}
	return nil
}

func (tx *Tx) fillRequest(n *entry) error {
	g := n.request
	if g == nil {
		return fmt.Errorf("%w: %s is made by NewGrant", ErrInvalidEvent, n.Type)
	}
	if g.Parent != uuid.Nil {
		s := tx.State()
		parent, ok := s.Grant(g.Parent)
		if !ok {
			return fmt.Errorf("%w: grant %s derives from %s, which does not exist", ErrIllegalMove, n.Grant, g.Parent)
		}
		if !tx.ledger.o.Kinds.Covers(parent.Capability, g.Capability) {
			return fmt.Errorf("%w: %s from %s", ErrNotCovered, g.Capability, parent.Capability)
		}
		if limit := parent.Limits.MaxDepth; limit != nil && (*limit < 1 || g.Limits.MaxDepth == nil || *g.Limits.MaxDepth >= *limit) {
			return fmt.Errorf("%w: max_depth of its parent is %d", ErrNotCovered, *limit)
		}
		if limit := parent.Limits.MaxUses; limit != nil && (g.Limits.MaxUses == nil || *g.Limits.MaxUses > *limit) {
			return fmt.Errorf("%w: max_uses of its parent is %d", ErrNotCovered, *limit)
		}
		if err := s.Usable(g.Parent, tx.now); err != nil {
			return fmt.Errorf("%w: its parent is dead: %w", ErrIllegalMove, err)
		}
		if outlives(g.Deadline, parent.Deadline, tx.now) {
			return fmt.Errorf("%w: it would outlive its parent", ErrNotCovered)
		}
	}
	r, err := newRequest(g)
	if err != nil {
		return err
	}
	n.dataKind, n.data = dataRequest, encodeRequest(nil, r)
	return nil
}

// outlives says whether either clock could end the parent before the child:
// the other one may be set back, or the machine restarted.
func outlives(child, parent capabilities.Deadline, now capabilities.Instant) bool {
	if parent.IsZero() {
		return false
	}
	return child.IsZero() || child.Wall.After(parent.Wall) || child.Remaining(now) > parent.Remaining(now) ||
		parent.BootID == now.BootID && parent.BootID != "" && (child.BootID != parent.BootID || child.Boot > parent.Boot)
}

// appended is the event as its Update returns it: what was asked for is known to
// who asked, and not made into JSON again.
func (e *entry) appended(hash Hash) Event {
	out := e.Event
	out.Hash, out.request = hash, nil
	if e.dataKind == dataJSON {
		out.Data = append([]byte(nil), e.data...)
	}
	return out
}

// public is the event as callers see it, sharing nothing with the record.
func (e *entry) public(hash Hash) (Event, error) {
	out := e.Event
	out.Hash, out.request = hash, nil
	switch e.dataKind {
	case dataJSON:
		if !json.Valid(e.data) {
			return Event{}, fmt.Errorf("%w: its data is not JSON", errRecord)
		}
		out.Data = append([]byte(nil), e.data...)
	case dataCarried:
		data, err := summary(e.data)
		if err != nil {
			return Event{}, err
		}
		out.Data = data
	case dataRequest:
		data, err := e.req.json()
		if err != nil {
			return Event{}, fmt.Errorf("%w: %w", errRecord, err)
		}
		out.Data = data
	}
	return out, nil
}
