package ledger

import (
	"encoding/json"
	"fmt"
	"math"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/capabilities"
)

// RenewData is the Data of grant.renewed. Its deadline takes the place of the
// one before, which it is never earlier than; what derives from the grant keeps
// its own.
type RenewData struct {
	Deadline capabilities.Deadline `json:"deadline"`
	Decision json.RawMessage       `json:"decision,omitempty"`
}

// NewRenewal is the grant.renewed event of a grant.
func NewRenewal(actor Actor, id uuid.UUID, d RenewData) Event {
	return Event{Type: GrantRenewed, Actor: actor, Grant: id, Data: mustJSON(d)}
}

// checkRenewal refuses a renewal of what is over, and one that would end
// sooner than before, or later than an ancestor, on either clock.
func (tx *Tx) checkRenewal(n *entry) error {
	d, err := readRenewal(n.Data)
	if err != nil {
		return err
	}
	s := tx.State()
	g, ok := s.Grant(n.Grant)
	if !ok {
		return fmt.Errorf("%w: %s of a grant that does not exist", ErrIllegalMove, n.Type)
	}
	if err := s.Live(n.Grant, tx.now); err != nil {
		return fmt.Errorf("%w: %s of a grant that is over: %w", ErrIllegalMove, n.Type, err)
	}
	if g.Deadline.IsZero() {
		return fmt.Errorf("%w: %s of a grant that has no deadline", ErrIllegalMove, n.Type)
	}
	if d.Deadline.BootID != tx.now.BootID || d.Deadline.Remaining(tx.now) < g.Deadline.Remaining(tx.now) || d.Deadline.Wall.Before(g.Deadline.Wall) {
		return fmt.Errorf("%w: a renewal until %v of a grant that ends at %v", ErrInvalidEvent, d.Deadline.Wall, g.Deadline.Wall)
	}
	if g.Parent != uuid.Nil {
		parent, _ := s.Grant(g.Parent)
		if outlives(d.Deadline, parent.Deadline, tx.now) {
			return fmt.Errorf("%w: it would outlive its parent", ErrNotCovered)
		}
	}
	return nil
}

func readRenewal(data []byte) (RenewData, error) {
	var d RenewData
	if err := json.Unmarshal(data, &d); err != nil {
		return d, fmt.Errorf("%w: the data of %s: %w", ErrInvalidEvent, GrantRenewed, err)
	}
	if d.Deadline.IsZero() || !storable(d.Deadline) {
		return d, fmt.Errorf("%w: a deadline at %v", ErrInvalidEvent, d.Deadline.Wall)
	}
	return d, nil
}

// storable tells whether a deadline is one that the clocks can express.
func storable(d capabilities.Deadline) bool {
	return d.Wall.Year() >= 1970 && d.Wall.Year() <= 2261 && d.Boot >= 0
}

func (f *folder) renewed(l *layer, e *entry) error {
	i, ok := l.find(e.Grant)
	if !ok {
		return fmt.Errorf("%w: %s of a grant that does not exist", ErrIllegalMove, e.Type)
	}
	if was := l.get(i); was.stateName().Ended() || !was.about.hasDeadline {
		return fmt.Errorf("%w: %s of a grant that is %s, or has no deadline", ErrIllegalMove, e.Type, was.stateName())
	}
	d, err := readRenewal(e.data)
	if err != nil {
		return err
	}
	n := l.mut(i)
	if n.generation == math.MaxUint32 {
		return fmt.Errorf("%w: grant %s has been changed too often", ErrIllegalMove, e.Grant)
	}
	// What should exist changes: it is to end later.
	n.generation++
	n.wall, n.boot = d.Deadline.Wall.UnixNano(), int64(d.Deadline.Boot)
	if id := f.in.string([]byte(d.Deadline.BootID)); id != n.about.bootID {
		a := *n.about
		a.bootID = id
		n.about = f.in.shared(a)
	}
	next := note{}
	if n.note != nil {
		next = *n.note
	}
	next.renewed, next.changed = e.Time.UnixNano(), e.Seq
	n.note = &next
	if l.due != nil {
		l.due.moved(i, n)
	}
	return nil
}

// renewedAt is when a grant was last renewed, or zero.
func (n *node) renewedAt() time.Time {
	if n.note == nil || n.note.renewed == 0 {
		return time.Time{}
	}
	return nanoTime(n.note.renewed)
}
