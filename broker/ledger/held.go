package ledger

import (
	"iter"

	"github.com/google/uuid"
)

// Held is what counts of an open grant for its holder.
type Held struct {
	ID              uuid.UUID
	Label, Instance string
	State           GrantState
	Persist         bool
}

// Held are a holder's grants that are not final, newest first. It makes nothing, so
// that it can be asked at every request.
func (s *State) Held(holder uuid.UUID) iter.Seq[Held] {
	return func(yield func(Held) bool) {
		for i := s.l.newestHeld(holder); i != none; {
			n := s.l.get(i)
			i = n.nextHeld
			if state := n.stateName(); !state.Final() &&
				!yield(Held{ID: n.id, Label: n.label, Instance: n.instance(), State: state, Persist: n.about.persist}) {
				return
			}
		}
	}
}
