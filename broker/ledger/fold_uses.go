package ledger

import (
	"fmt"
	"math"

	"github.com/google/uuid"

	"spectrum-os.org/broker/capabilities"
)

// usage is what was charged to a grant.
type usage struct {
	count uint32
	run   string // the run of its holder that it was last charged for itself
}

func (l *layer) usage(i int32) usage {
	for ; l != nil; l = l.below {
		if u, ok := l.used[i]; ok {
			return u
		}
	}
	return usage{}
}

// spent tells whether no use is left on node i alone.
func (l *layer) spent(i int32) bool {
	most := l.get(i).about.maxUses
	return most >= 0 && int64(l.usage(i).count) >= int64(most)
}

// used charges one use to a grant and to every ancestor. A run is charged once,
// a budget is never overdrawn, and what ended is not used.
func (f *folder) used(l *layer, e *entry) error {
	d, err := read[UsedData](e)
	if err != nil {
		return err
	}
	i, ok := l.find(e.Grant)
	if !ok {
		return fmt.Errorf("%w: %s of a grant that does not exist", ErrIllegalMove, e.Type)
	}
	if d.Instance == "" {
		return fmt.Errorf("%w: %s for no run", ErrInvalidEvent, e.Type)
	}
	own := l.usage(i)
	if own.run == d.Instance {
		return fmt.Errorf("%w: grant %s was charged for run %s already", ErrIllegalMove, e.Grant, d.Instance)
	}
	for at := i; at != none; at = l.get(at).parent {
		switch n := l.get(at); {
		case n.stateName().Ended():
			return fmt.Errorf("%w: %s of a grant that is %s", ErrIllegalMove, e.Type, n.stateName())
		case l.spent(at) || l.usage(at).count == math.MaxUint32:
			return fmt.Errorf("%w: %w", ErrIllegalMove, &DeadError{e.Grant, n.id, ErrUsedUp})
		}
	}
	own.run = f.in.string([]byte(d.Instance))
	own.count++
	setKey(&l.used, i, own)
	for at := l.get(i).parent; at != none; at = l.get(at).parent {
		u := l.usage(at)
		u.count++
		setKey(&l.used, at, u)
	}
	return nil
}

// Charged tells whether a grant's use for that run of its holder was charged.
func (s *State) Charged(id uuid.UUID, instance string) bool {
	i, ok := s.l.find(id)
	return ok && instance != "" && s.l.usage(i).run == instance
}

// Spent is a *DeadError that names the grant whose budget is used up, itself or
// an ancestor, or nil while another use is left.
func (s *State) Spent(id uuid.UUID) error {
	first, ok := s.l.find(id)
	if !ok {
		return &DeadError{id, id, ErrUnknownGrant}
	}
	for i := first; i != none; i = s.l.get(i).parent {
		if s.l.spent(i) {
			return &DeadError{id, s.l.get(i).id, ErrUsedUp}
		}
	}
	return nil
}

// Usable is nil when a grant is in force, and a use of it is left: only then may
// something derive from it, and is its token good.
func (s *State) Usable(id uuid.UUID, now capabilities.Instant) error {
	if err := s.Live(id, now); err != nil {
		return err
	}
	return s.Spent(id)
}
