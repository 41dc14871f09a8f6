package shim

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/failpoint"
)

// server is the shim: the state of its VM, and who may change it.
type server struct {
	spec    Spec
	clock   clock.Clock
	log     *slog.Logger
	spawner *spawner
	cgroup  *cgroup    // nil: none
	boot    []*os.File // kernel, initrd, disks
	console *console
	self    Proc

	stopping  chan struct{} // closed: the VM shall end
	stopOnce  sync.Once
	finished  chan struct{} // closed: the VM has ended for good
	toldEnd   chan struct{} // closed: somebody was told so
	toldOnce  sync.Once
	deadlines chan struct{} // a deadline may have changed

	mu       sync.Mutex
	grace    time.Duration
	seq      uint64
	changed  chan struct{} // closed at the next change
	phase    string
	reason   string
	instance *instance
	objects  map[string]*object
	buried   *graveyard
	degraded []string
}

// update changes the state and tells the watchers.
func (s *server) update(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	s.bump()
}

func (s *server) bump() {
	s.seq++
	close(s.changed)
	s.changed = make(chan struct{})
}

// degrade notes what this instance cannot do any more.
func (s *server) degrade(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	s.log.Warn("VM is degraded", "reason", text)
	s.update(func() { s.degraded = append(s.degraded, text) })
}

// state is a copy, under the mutex.
func (s *server) state() State {
	st := State{
		Seq: s.seq, VM: s.spec.VM, Phase: s.phase, Objects: []ObjectState{},
		Degraded: slices.Clone(s.degraded), ExitReason: s.reason, ShimPid: s.self.PID,
	}
	if i := s.instance; i != nil {
		st.Instance, st.SlotsFree = i.id, i.slots.total()
		if i.vmm != nil && !i.vmm.hasExited() {
			st.VMMPid = i.vmm.PID
		}
	}
	for _, o := range s.objects {
		st.Objects = append(st.Objects, o.state())
	}
	slices.SortFunc(st.Objects, func(a, b ObjectState) int { return strings.Compare(a.ID, b.ID) })
	return st
}

func (o *object) state() ObjectState {
	st := ObjectState{
		ID: o.id, Generation: o.spec.Generation, Phase: o.phase, Tag: o.spec.Tag,
		Deadline: o.spec.Deadline, SingleFile: o.spec.SingleFile != "",
		Killed: o.killed, Since: o.since,
	}
	if o.child != nil && !o.child.hasExited() {
		st.PIDs = []Proc{o.child.Proc}
	}
	if o.err != nil && o.err.Code != CodeRemoved {
		st.Error = o.err.Message
	}
	return st
}

// watch returns the state once it is not seen, or after a while.
func (s *server) watch(ctx context.Context, seen uint64) State {
	timer := time.NewTimer(maxWatch)
	defer timer.Stop()
	for {
		s.mu.Lock()
		st, changed := s.state(), s.changed
		s.mu.Unlock()
		if st.Seq != seen {
			return st
		}
		select {
		case <-changed:
		case <-timer.C:
			return st
		case <-ctx.Done():
			return st
		}
	}
}

// put accepts an object, or finds it, and waits for its device. f is the
// server's from here on.
func (s *server) put(ctx context.Context, spec *Object, f *os.File) (ObjectState, *Error) {
	for {
		o, wait, err := s.accept(spec, f)
		if err != nil {
			_ = f.Close()
			return ObjectState{}, err
		}
		if wait != nil { // an older generation is on its way out
			select {
			case <-wait:
				continue
			case <-ctx.Done():
				_ = f.Close()
				return ObjectState{}, refuse(CodeRemoved, "the caller left")
			}
		}
		select {
		case <-o.up:
		case <-ctx.Done():
			// The object stays; whoever asks again finds it.
			return ObjectState{}, refuse(CodeRemoved, "the caller left")
		}
		s.mu.Lock()
		st, upErr := o.state(), o.err
		s.mu.Unlock()
		if upErr != nil {
			return st, upErr
		}
		return st, nil
	}
}

// accept decides at once what a put means.
func (s *server) accept(spec *Object, f *os.File) (o *object, wait <-chan struct{}, _ *Error) {
	inode, err := identify(f)
	if err != nil {
		return nil, nil, refuse(CodeBadRequest, "descriptor of %s: %v", spec.ID, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.phase != Running:
		return nil, nil, refuse(CodeNotRunning, "the VM is %s", s.phase)
	case spec.Instance != s.instance.id:
		return nil, nil, refuse(CodeWrongInstance, "%s is for instance %q of the VM, which is now %q", spec.ID, spec.Instance, s.instance.id)
	case spec.Deadline.Passed(s.clock.Now()):
		return nil, nil, refuse(CodeExpired, "the deadline of %s has passed", spec.ID)
	case s.buried.has(spec.ID, spec.Generation):
		return nil, nil, refuse(CodeStaleGeneration, "generation %d of %s was removed", spec.Generation, spec.ID)
	}
	if o := s.objects[spec.ID]; o != nil {
		return s.again(o, spec, inode, f)
	}
	for _, other := range s.objects {
		if other.phase != Gone && other.spec.Tag == spec.Tag {
			return nil, nil, refuse(CodeBadRequest, "tag %s is that of %s", spec.Tag, other.id)
		}
	}
	segment, ok := s.instance.slots.take()
	if !ok {
		return nil, nil, refuse(CodeNoSlots, "the VM has no free slot for another device")
	}
	o = &object{
		instance: s.instance, id: spec.ID, segment: segment, inode: inode,
		end: make(chan struct{}), up: make(chan struct{}), done: make(chan struct{}),
		spec: *spec, phase: Attaching, since: s.clock.Now().Wall,
	}
	s.objects[spec.ID] = o
	s.bump()
	s.instance.tasks.Go(func() { s.serve(o, f) })
	s.deadlineChanged()
	return o, nil, nil
}

// again answers a put of an object that exists.
func (s *server) again(o *object, spec *Object, inode fileID, f *os.File) (*object, <-chan struct{}, *Error) {
	switch {
	case o.retired:
		return nil, nil, refuse(CodeRetired, "what served %s ended under the guest in this instance of the VM", o.id)
	case spec.Generation < o.spec.Generation:
		return nil, nil, refuse(CodeStaleGeneration, "generation %d of %s is older than %d", spec.Generation, o.id, o.spec.Generation)
	case o.ending() || o.phase == Detaching || o.phase == Gone:
		if spec.Generation == o.spec.Generation {
			return nil, nil, refuse(CodeStaleGeneration, "generation %d of %s is being removed", spec.Generation, o.id)
		}
		return nil, o.done, nil
	}
	same := o.spec
	same.Generation, same.Deadline = spec.Generation, spec.Deadline
	if same != *spec || inode != o.inode {
		return nil, nil, refuse(CodeBadRequest, "%s exists and is something else", o.id)
	}
	_ = f.Close()
	if o.spec.Generation != spec.Generation {
		o.spec.Generation, o.spec.Deadline = spec.Generation, spec.Deadline
		s.bump()
		s.deadlineChanged()
	}
	return o, nil, nil
}

// remove ends an object and waits until it is gone.
func (s *server) remove(ctx context.Context, id string, generation uint64) (ObjectState, *Error) {
	s.mu.Lock()
	o := s.objects[id]
	if o == nil {
		s.buried.put(id, generation)
		s.mu.Unlock()
		return ObjectState{ID: id, Generation: generation, Phase: Gone}, nil
	}
	if generation < o.spec.Generation {
		s.mu.Unlock()
		return ObjectState{}, refuse(CodeStaleGeneration, "generation %d of %s is older than %d", generation, id, o.spec.Generation)
	}
	s.buried.put(id, generation)
	o.stop()
	s.mu.Unlock()
	select {
	case <-o.done:
	case <-ctx.Done():
		return ObjectState{}, refuse(CodeRemoved, "the caller left")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return o.state(), nil
}

// stop makes the VM end: asked at first, by force after grace.
func (s *server) stop(grace time.Duration) {
	s.stopOnce.Do(func() {
		s.mu.Lock()
		s.grace = grace
		s.mu.Unlock()
		close(s.stopping)
	})
}

func (s *server) deadlineChanged() {
	select {
	case s.deadlines <- struct{}{}:
	default:
	}
}

// tick is how late a set clock or a resume is noticed at most, where the kernel
// does not tell of it.
const tick = time.Second

// keepDeadlines ends objects at their deadline, with one timer for all.
func (s *server) keepDeadlines(ctx context.Context) {
	changes, err := clock.Changes(ctx)
	if err != nil {
		s.log.Warn("a clock that is set is noticed late", "error", err)
	}
	for {
		var timer <-chan time.Time
		if next, any := s.expire(); any {
			timer = time.After(min(next, tick))
		}
		select {
		case <-timer:
		case <-s.deadlines:
		case <-changes:
		case <-ctx.Done():
			return
		}
	}
}

// expire ends what is over and tells when the next one is.
func (s *server) expire() (next time.Duration, any bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.clock.Now()
	next = tick
	for _, o := range s.objects {
		if o.spec.Deadline.IsZero() || o.phase == Gone || o.ending() {
			continue
		}
		left := o.spec.Deadline.Remaining(now)
		if left == 0 {
			failpoint.Hit("shim.deadline")
			s.log.Info("deadline has passed", "object", o.id)
			o.stop()
			continue
		}
		next, any = min(next, left), true
	}
	return next, any
}

// path spells a file of the runtime directory for the VMM: absolute, or, where
// that is too long for a socket's address, relative to the working directory
// that the VMM shares.
func (s *server) path(name string) string {
	if abs := filepath.Join(s.spec.RuntimeDir, name); len(abs) < 108 {
		return abs
	}
	return name
}

// graveyard remembers the removed generations of the last ids.
type graveyard struct {
	gens  map[string]uint64
	order []string
}

const maxBuried = 4096

func newGraveyard() *graveyard { return &graveyard{gens: map[string]uint64{}} }

func (g *graveyard) put(id string, generation uint64) {
	old, known := g.gens[id]
	if !known {
		g.order = append(g.order, id)
		if len(g.order) > maxBuried {
			delete(g.gens, g.order[0])
			g.order = g.order[1:]
		}
	}
	g.gens[id] = max(old, generation)
}

func (g *graveyard) has(id string, generation uint64) bool {
	old, known := g.gens[id]
	return known && generation <= old
}
