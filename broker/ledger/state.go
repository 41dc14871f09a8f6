package ledger

import (
	"slices"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/capabilities"
)

// State is what follows from the events. It is valid only while the function
// that it was handed to runs.
type State struct {
	l     *layer
	kinds *capabilities.Kinds
}

// grant is a copy of node i.
func (s *State) grant(i int32) Grant {
	n := s.l.get(i)
	a := n.about
	g := Grant{
		ID: n.id, Holder: a.holder, HolderPartition: a.partition, Instance: n.instance(), Depth: int(n.depth),
		Capability: n.capability.decode(s.kinds), Label: n.label, State: n.stateName(), Generation: uint64(n.generation),
		Created: nanoTime(n.created), Deadline: n.deadline(), Persist: a.persist, Declared: a.declared,
		Actor: a.actor.public(), Seq: n.seq, Changed: n.seq, Renewed: n.renewedAt(),
	}
	if n.parent != none {
		g.Parent = s.l.get(n.parent).id
	}
	if a.maxDepth >= 0 {
		v := a.maxDepth
		g.Limits.MaxDepth = &v
	}
	if a.maxUses >= 0 {
		v := a.maxUses
		g.Limits.MaxUses = &v
	}
	g.Uses = int(s.l.usage(i).count)
	if a.decision != "" {
		g.Decision = []byte(a.decision)
	}
	if n.note != nil {
		g.Reason, g.Degraded = n.note.reason, n.note.degraded
		g.Changed = max(g.Changed, n.note.changed)
		if n.note.troubled != nil && !g.State.Final() {
			g.Troubled = *n.note.troubled
		}
	}
	return g
}

// Grant is the grant with that id.
func (s *State) Grant(id uuid.UUID) (Grant, bool) {
	i, ok := s.l.find(id)
	if !ok {
		return Grant{}, false
	}
	return s.grant(i), true
}

// Grants are those that f selects, in the order in which they were made. With
// states that are not final it costs what is open, of the holder if there is one;
// with a parent what that one has; else what the ledger has.
func (s *State) Grants(f Filter) []Grant {
	var out []Grant
	take := func(i int32) {
		if f.selects(s.l.get(i)) {
			out = append(out, s.grant(i))
		}
	}
	switch {
	case f.Parent != uuid.Nil:
		p, ok := s.l.find(f.Parent)
		if !ok {
			return nil
		}
		for i := s.l.get(p).firstChild; i != none; i = s.l.get(i).nextSibling {
			take(i)
		}
		slices.Reverse(out)
	case len(f.States) > 0 && !slices.ContainsFunc(f.States, GrantState.Final):
		for _, i := range s.l.open(f.Holder) {
			take(i)
		}
	default:
		for i := range s.l.len() {
			take(i)
		}
	}
	return out
}

// Subtree are all grants derived from id, itself left out, parents before
// their children.
func (s *State) Subtree(id uuid.UUID) []uuid.UUID {
	root, ok := s.l.find(id)
	if !ok {
		return nil
	}
	var out []uuid.UUID
	queue := []int32{root}
	for len(queue) > 0 {
		i := queue[0]
		queue = queue[1:]
		for c := s.l.get(i).firstChild; c != none; c = s.l.get(c).nextSibling {
			out = append(out, s.l.get(c).id)
			queue = append(queue, c)
		}
	}
	return out
}

// Live is nil when the grant and every ancestor of it are in force, else a
// *DeadError.
func (s *State) Live(id uuid.UUID, now capabilities.Instant) error {
	i, ok := s.l.find(id)
	if !ok {
		return &DeadError{id, id, ErrUnknownGrant}
	}
	now = s.Effective(now)
	for ; i != none; i = s.l.get(i).parent {
		n := s.l.get(i)
		if err := n.dead(now); err != nil {
			return &DeadError{id, n.id, err}
		}
	}
	return nil
}

// dead is why a grant itself gives nothing at an [State.Effective] instant, or nil.
func (n *node) dead(now capabilities.Instant) error {
	switch st := n.stateName(); {
	case st == Failed:
		return ErrFailed
	case st.Ended():
		return ErrRevoked
	case n.about.hasDeadline && remaining(n, now) == 0:
		return ErrExpired
	}
	return nil
}

// Effective is now, but never before the high-water mark of the wall clock,
// which goes on with this boot's time: a clock that was set back stretches
// nothing, and does not stop time either. What it cannot see is time for which
// the machine was off.
func (s *State) Effective(now capabilities.Instant) capabilities.Instant {
	h := nanoTime(s.l.meta.highwater)
	if due := s.l.committed().due; due != nil && due.bootID == now.BootID {
		h = h.Add(max(0, now.Boot-nanoDuration(s.l.meta.boot)))
		if least := s.l.meta.anchor.atLeast(now.Boot); h.Before(least) {
			h = least
		}
	}
	if now.Wall.Before(h) {
		now.Wall = h
	}
	return now
}

// Binding is the partition that first presented the VM; the nil UUID is the
// built-in directory.
func (s *State) Binding(vm uuid.UUID) (uuid.UUID, bool) {
	v := s.l.vm(vm)
	return v.partition, v.bound
}

// KnownVM is the VM that was bound with this alias in its partition.
func (s *State) KnownVM(partition uuid.UUID, alias string) (uuid.UUID, bool) {
	return s.l.alias(aliasKey{partition, alias})
}

// Running is the instance of a VM that was started and has not exited.
func (s *State) Running(vm uuid.UUID) (instance string, ok bool) {
	v := s.l.vm(vm)
	return v.instance, v.running
}

// RunChanged is the event that last began or ended a run of a VM.
func (s *State) RunChanged(vm uuid.UUID) uint64 { return s.l.vm(vm).changed }

// Runs are the instances of all VMs that were started and have not exited.
func (s *State) Runs() map[uuid.UUID]string {
	out := map[uuid.UUID]string{}
	seen := map[uuid.UUID]bool{}
	for l := s.l; l != nil; l = l.below {
		for vm, v := range l.vms {
			if v.running && !seen[vm] {
				out[vm] = v.instance
			}
			seen[vm] = true
		}
	}
	return out
}

// Names are the petnames of partitions.
func (s *State) Names() map[uuid.UUID]string { return s.l.allNames() }

// Epoch counts the lives of the ledger; a restored one has a new epoch.
func (s *State) Epoch() uint64 { return s.l.meta.epoch }

// LedgerID tells this ledger from any other.
func (s *State) LedgerID() uuid.UUID { return s.l.meta.ledger }

// Seq is the newest event.
func (s *State) Seq() uint64 { return s.l.meta.seq }

// HighWater is the latest wall time that was ever recorded.
func (s *State) HighWater() time.Time { return nanoTime(s.l.meta.highwater) }

// decode is the capability. One whose kind this program does not know keeps
// its kind and has no resource: nothing covers it and nobody applies it.
func (c *storedCapability) decode(kinds *capabilities.Kinds) capabilities.Capability {
	if p := c.decoded.Load(); p != nil {
		return *p
	}
	v, err := kinds.DecodeJSON([]byte(c.json))
	if err != nil {
		v = capabilities.Capability{Kind: kindOf(c.json)}
	}
	c.decoded.Store(&v)
	return v
}

func newActor(a Actor) actor {
	out := actor{kind: a.Kind, uid: -1, vm: a.VM, pid: a.PID}
	if a.UID != nil {
		out.uid = int64(*a.UID)
	}
	return out
}

func (a actor) public() Actor {
	out := Actor{Kind: a.kind, VM: a.vm, PID: a.pid}
	if a.uid >= 0 {
		uid := uint32(a.uid)
		out.UID = &uid
	}
	return out
}
