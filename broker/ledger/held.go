package ledger

import (
	"encoding/hex"
	"iter"
	"strings"

	"github.com/google/uuid"

	"spectrum-os.org/broker/capabilities"
)

// What is asked at every request, or of all grants, is answered here without
// making a Grant of each.

// Held is what counts of an open grant for its holder.
type Held struct {
	ID              uuid.UUID
	Label, Instance string
	State           GrantState
	Persist         bool
	Resource        uuid.UUID // the partition that its resource belongs to
	HasResource     bool      // if it belongs to one
}

// Held are a holder's grants that are not final, in no order.
func (s *State) Held(holder uuid.UUID) iter.Seq[Held] {
	return func(yield func(Held) bool) {
		s.l.eachOpen(holder, func(_ int32, n *node) bool {
			return yield(Held{
				ID: n.id, Label: n.label, Instance: n.instance(), State: n.stateName(), Persist: n.about.persist,
				Resource: n.capability.resource, HasResource: n.capability.hasOwner,
			})
		})
	}
}

// Holders are those who hold a grant that is not final.
func (s *State) Holders() []uuid.UUID {
	var out []uuid.UUID
	for h := range s.l.holders() {
		s.l.eachOpen(h, func(int32, *node) bool {
			out = append(out, h)
			return false
		})
	}
	return out
}

// Count is how many of the grants that are not final f selects.
func (s *State) Count(f Filter) int {
	n := 0
	s.l.eachOpen(f.Holder, func(_ int32, node *node) bool {
		if f.selects(node) {
			n++
		}
		return true
	})
	return n
}

// selects tells whether f does, by all but the parent.
func (f Filter) selects(n *node) bool {
	a := n.about
	return f.state(n.stateName()) &&
		(f.Holder == uuid.Nil || f.Holder == a.holder) &&
		(f.HolderPartition == uuid.Nil || f.HolderPartition == a.partition) &&
		(f.ResourcePartition == uuid.Nil || n.capability.hasOwner && n.capability.resource == f.ResourcePartition) &&
		(f.Instance == "" || f.Instance == n.instance())
}

// HoldsDead tells whether a holder has an open grant that is not [State.Live].
func (s *State) HoldsDead(holder uuid.UUID, now capabilities.Instant) bool {
	now = s.Effective(now)
	dead := false
	s.l.eachOpen(holder, func(_ int32, n *node) bool {
		dead = n.dead(now) != nil
		for i := n.parent; i != none && !dead; i = n.parent {
			n = s.l.get(i)
			dead = n.dead(now) != nil
		}
		return !dead
	})
	return dead
}

// prefixStep is how many grants Prefixed looks at: commits wait for who looks.
const prefixStep = 1 << 16

// Prefixed are the ids that begin with at least two digits, in lower case, of some
// of the grants that ever were: the first ones from the given place on. The next
// place is 0 at the end.
func (s *State) Prefixed(digits string, from int) (ids []uuid.UUID, next int) {
	var first [1]byte
	if len(digits) < 2 {
		return nil, 0
	}
	if _, err := hex.Decode(first[:], []byte(digits[:2])); err != nil {
		return nil, 0
	}
	end := min(int(s.l.len()), from+prefixStep)
	for i := from; i < end; i++ {
		if id := &s.l.get(int32(i)).id; id[0] == first[0] && strings.HasPrefix(id.String(), digits) {
			ids = append(ids, *id)
		}
	}
	if end == int(s.l.len()) {
		return ids, 0
	}
	return ids, end
}
