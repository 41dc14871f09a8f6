package ledger

import "github.com/google/uuid"

// Lineage is a grant and all that it derives from, itself first.
func (s *State) Lineage(id uuid.UUID) []Grant {
	var out []Grant
	i, ok := s.l.find(id)
	for ; ok && i != none; i = s.l.get(i).parent {
		out = append(out, s.grant(i))
	}
	return out
}

// OpenSubtree are the grants derived from id that are not final, and id itself
// first, whatever its state; parents before their children.
func (s *State) OpenSubtree(id uuid.UUID) []uuid.UUID {
	root, ok := s.l.find(id)
	if !ok {
		return nil
	}
	out := []uuid.UUID{id}
	s.descend(root, func(n *node) {
		if !n.stateName().Final() {
			out = append(out, n.id)
		}
	})
	return out
}

// Heirs are the holders of all that is not final of the given grants and of what
// derives from them: who is to be looked at when those end.
func (s *State) Heirs(ids ...uuid.UUID) []uuid.UUID {
	seen := map[uuid.UUID]bool{}
	var out []uuid.UUID
	take := func(n *node) {
		if holder := n.about.holder; !seen[holder] && !n.stateName().Final() {
			seen[holder] = true
			out = append(out, holder)
		}
	}
	for _, id := range ids {
		if root, ok := s.l.find(id); ok {
			take(s.l.get(root))
			s.descend(root, take)
		}
	}
	return out
}

// descend visits all that derives from node root, parents first. What is final
// may have heirs that are not: their ends are recorded later.
func (s *State) descend(root int32, visit func(n *node)) {
	queue := []int32{root}
	for len(queue) > 0 {
		i := queue[0]
		queue = queue[1:]
		for c := s.l.get(i).firstChild; c != none; {
			n := s.l.get(c)
			visit(n)
			if n.firstChild != none {
				queue = append(queue, c)
			}
			c = n.nextSibling
		}
	}
}

// HasAncestorIn tells whether one of the ancestors of id is among them.
func (s *State) HasAncestorIn(id uuid.UUID, among map[uuid.UUID]bool) bool {
	i, ok := s.l.find(id)
	if !ok {
		return false
	}
	for i = s.l.get(i).parent; i != none; i = s.l.get(i).parent {
		if among[s.l.get(i).id] {
			return true
		}
	}
	return false
}
