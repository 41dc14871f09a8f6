package ledger

import (
	"iter"
	"math"
	"time"

	"github.com/google/uuid"
	"spectrum-os.org/broker/capabilities"
)

func nanoTime(ns int64) time.Time                               { return time.Unix(0, ns).UTC() }
func nanoDuration(ns int64) time.Duration                       { return time.Duration(ns) }
func remaining(n *node, now capabilities.Instant) time.Duration { return n.deadline().Remaining(now) }

// deadlines orders the grants that have a deadline: by wall time, and those
// of the present boot by boot time too, since either clock may be the one
// that ends a lease. What a renewal left behind, and grants that ended, are
// dropped when they surface.
type deadlines struct {
	bootID     string
	wall, boot deadlineHeap
	stale      int // entries that renewals left behind, at most
}

// deadlineHeap is a binary heap, the earliest first.
type deadlineHeap []timed

type timed struct {
	at   int64
	node int32
}

func (d *deadlines) add(i int32, n *node) {
	if !n.about.hasDeadline {
		return
	}
	d.wall.push(timed{n.wall, i})
	if n.about.bootID == d.bootID && d.bootID != "" {
		d.boot.push(timed{n.boot, i})
	}
}

// moved adds the new deadline of a grant that is in the heaps already.
func (d *deadlines) moved(i int32, n *node) {
	d.stale += 2
	d.add(i, n)
}

// holds tells whether an entry of the wall or of the boot heap still says when
// a lease ends, as the layer sees it.
func (d *deadlines) holds(l *layer, boot bool, t timed) bool {
	n := l.get(t.node)
	if n.stateName().Ended() || !n.about.hasDeadline {
		return false
	}
	if boot {
		return n.about.bootID == d.bootID && n.boot == t.at
	}
	return n.wall == t.at
}

// prune keeps the earliest of each heap one that still runs, and what renewals
// left behind less than what counts.
func (d *deadlines) prune(l *layer) {
	const few = 1024
	sweep := d.stale > few && d.stale > (len(d.wall)+len(d.boot))/2
	for _, heap := range []struct {
		h    *deadlineHeap
		boot bool
	}{{&d.wall, false}, {&d.boot, true}} {
		h := heap.h
		if sweep {
			all := *h
			*h = nil
			for _, t := range all {
				if d.holds(l, heap.boot, t) {
					h.push(t)
				}
			}
		}
		for len(*h) > 0 && !d.holds(l, heap.boot, (*h)[0]) {
			h.pop()
		}
	}
	if sweep {
		d.stale = 0
	}
}

func (h *deadlineHeap) push(t timed) {
	*h = append(*h, t)
	s := *h
	for i := len(s) - 1; i > 0; {
		up := (i - 1) / 2
		if s[up].at <= s[i].at {
			return
		}
		s[up], s[i] = s[i], s[up]
		i = up
	}
}

func (h *deadlineHeap) pop() {
	s := *h
	s[0] = s[len(s)-1]
	s = s[:len(s)-1]
	*h = s
	for i := 0; ; {
		least := i
		for _, c := range [...]int{2*i + 1, 2*i + 2} {
			if c < len(s) && s[c].at < s[least].at {
				least = c
			}
		}
		if least == i {
			return
		}
		s[i], s[least] = s[least], s[i]
		i = least
	}
}

// until calls fn for every entry at or before at, and stops when fn says no.
func (h deadlineHeap) until(at int64, fn func(i int32) bool) {
	stack := []int{0}
	for len(stack) > 0 {
		k := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		if k >= len(h) || h[k].at > at {
			continue
		}
		if !fn(h[k].node) {
			return
		}
		stack = append(stack, 2*k+1, 2*k+2)
	}
}

// first is the earliest entry that counts.
func (h deadlineHeap) first(counts func(timed) bool) (node int32, ok bool) {
	best := int64(math.MaxInt64)
	stack := []int{0}
	for len(stack) > 0 {
		k := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		switch {
		case k >= len(h) || ok && h[k].at >= best:
		case counts(h[k]):
			node, best, ok = h[k].node, h[k].at, true
		default:
			stack = append(stack, 2*k+1, 2*k+2)
		}
	}
	return node, ok
}

// committed is the bottom layer and how many nodes it has.
func (l *layer) committed() *layer {
	for l.below != nil {
		l = l.below
	}
	return l
}

// Due are grants that passed their deadline and are neither revoking nor
// ended, at most limit of them; 0 means all.
func (s *State) Due(now capabilities.Instant, limit int) []uuid.UUID {
	var out []uuid.UUID
	seen := map[int32]bool{}
	s.due(now, func(i int32, n *node) bool {
		if !seen[i] {
			seen[i] = true
			out = append(out, n.id)
		}
		return limit <= 0 || len(out) < limit
	})
	return out
}

// DueHolders are the holders of all grants that Due are. What derives from a
// grant never outlives it, so that the holders of all that ends with it are
// among them.
func (s *State) DueHolders(now capabilities.Instant) map[uuid.UUID]struct{} {
	var out map[uuid.UUID]struct{}
	s.due(now, func(_ int32, n *node) bool {
		setKey(&out, n.about.holder, struct{}{})
		return true
	})
	return out
}

// due calls fn for every grant that is due, for some of them twice, until it
// says no.
func (s *State) due(now capabilities.Instant, fn func(i int32, n *node) bool) {
	now = s.Effective(now)
	root := s.l.committed()
	more := true
	take := func(i int32) bool {
		n := s.l.get(i)
		if n.about.hasDeadline && !n.stateName().Ended() && remaining(n, now) == 0 {
			more = fn(i, n)
		}
		return more
	}
	root.due.wall.until(now.Wall.UnixNano(), take)
	if more && now.BootID == root.due.bootID {
		root.due.boot.until(int64(now.Boot), take)
	}
	for i := range s.l.unmerged(root) {
		if !more {
			return
		}
		take(i)
	}
}

// unmerged are the grants that layers above the bottom one made or changed.
func (l *layer) unmerged(root *layer) iter.Seq[int32] {
	return func(yield func(int32) bool) {
		for i := root.len(); i < l.len(); i++ {
			if !yield(i) {
				return
			}
		}
		for ; l != root; l = l.below {
			for i := range l.changed {
				if !yield(i) {
					return
				}
			}
		}
	}
}

// NextDeadline is how long it is until the next grant that has not ended
// passes its deadline: zero where one has passed already, false where none
// has a deadline.
func (s *State) NextDeadline(now capabilities.Instant) (time.Duration, bool) {
	now = s.Effective(now)
	root := s.l.committed()
	next, found := time.Duration(math.MaxInt64), false
	look := func(i int32) {
		n := s.l.get(i)
		if n.about.hasDeadline && !n.stateName().Ended() {
			next, found = min(next, remaining(n, now)), true
		}
	}
	for _, heap := range []struct {
		h    deadlineHeap
		boot bool
	}{{root.due.wall, false}, {root.due.boot, true}} {
		if i, ok := heap.h.first(func(t timed) bool { return root.due.holds(s.l, heap.boot, t) }); ok {
			look(i)
		}
	}
	// What this Update made or renewed is in no heap yet.
	for i := range s.l.unmerged(root) {
		look(i)
	}
	return next, found
}
