package applyfs

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/vmm/shim"
)

// fakeShim keeps the semantics of vmm/shim/server.go (accept, again, remove, the
// graveyard) and of the phases in vmm/shim/object.go (serve, attach, cut, gone):
// an object attaches after a while and goes on doing so when its caller leaves;
// a removal is remembered by its generation, also where there is nothing to
// remove, and overtakes what attaches; what a guest held past the deadline is
// killed and its id retired; a run's objects and its graveyard end with it. It
// serves nothing, so that it needs neither root nor a VMM.
type fakeShim struct {
	vm uuid.UUID
	// attaching and ejecting are how long a device takes to come and to go.
	attaching, ejecting time.Duration

	mu       sync.Mutex
	instance string
	phase    string
	over     chan struct{} // closed: the run is over
	objects  map[string]*fakeObject
	buried   map[string]uint64
	served   int
	holds    bool // the guest lets go of nothing
	// One failure each: of the next Put, and of all States and Removes.
	putErr, err error
	tasks       sync.WaitGroup
}

type fakeObject struct {
	spec     shim.Object
	file     unix.Stat_t
	identity string
	phase    string
	killed   bool
	err      *shim.Error
	once     sync.Once
	end      chan struct{} // closed: end it
	up       chan struct{} // closed: attached, or it never will be
	done     chan struct{} // closed: gone
}

func newFakeShim(vm uuid.UUID) *fakeShim {
	s := &fakeShim{vm: vm, attaching: 5 * time.Millisecond, ejecting: 5 * time.Millisecond}
	s.begin()
	return s
}

func (s *fakeShim) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.instance, s.phase, s.over = uuid.NewString(), shim.Running, make(chan struct{})
	s.objects, s.buried = map[string]*fakeObject{}, map[string]uint64{}
}

// finish ends the run and all that is in it.
func (s *fakeShim) finish(phase string) {
	s.mu.Lock()
	s.phase = phase
	select {
	case <-s.over:
	default:
		close(s.over)
	}
	s.mu.Unlock()
	s.tasks.Wait()
}

func (s *fakeShim) reboot() {
	s.finish(shim.Starting)
	s.begin()
}

func (s *fakeShim) close() { s.finish(shim.Stopped) }

func (s *fakeShim) run() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.instance
}

func refuse(code, format string, args ...any) *shim.Error {
	return &shim.Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

func (s *fakeShim) State(ctx context.Context) (shim.State, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.failure(ctx); err != nil {
		return shim.State{}, err
	}
	st := shim.State{VM: s.vm, Instance: s.instance, Phase: s.phase, ShimPid: 1}
	if s.phase == shim.Running || s.phase == shim.Stopping {
		st.VMMPid = 2
	}
	for _, o := range s.objects {
		st.Objects = append(st.Objects, o.state())
	}
	slices.SortFunc(st.Objects, func(a, b shim.ObjectState) int { return strings.Compare(a.ID, b.ID) })
	return st, nil
}

func (s *fakeShim) failure(ctx context.Context) error {
	if ctx.Err() != nil {
		return fmt.Errorf("cannot reach the shim: %w", ctx.Err())
	}
	return s.err
}

func (o *fakeObject) state() shim.ObjectState {
	st := shim.ObjectState{ID: o.spec.ID, Generation: o.spec.Generation, Phase: o.phase, Tag: o.spec.Tag, Deadline: o.spec.Deadline, SingleFile: o.spec.SingleFile != "", Killed: o.killed}
	if o.err != nil && o.err.Code != shim.CodeRemoved {
		st.Error = o.err.Message
	}
	return st
}

func (o *fakeObject) ending() bool {
	select {
	case <-o.end:
		return true
	default:
		return o.phase == shim.Detaching || o.phase == shim.Gone
	}
}

func (o *fakeObject) stop() { o.once.Do(func() { close(o.end) }) }

func (s *fakeShim) Extend(ctx context.Context, e shim.Extension) (shim.ObjectState, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.failure(ctx); err != nil {
		return shim.ObjectState{}, err
	}
	o := s.objects[e.ID]
	switch {
	case s.phase != shim.Running:
		return shim.ObjectState{}, refuse(shim.CodeNotRunning, "the VM is %s", s.phase)
	case e.Instance != s.instance:
		return shim.ObjectState{}, refuse(shim.CodeWrongInstance, "another run")
	case o == nil || o.ending():
		return shim.ObjectState{}, refuse(shim.CodeRemoved, "%s has ended", e.ID)
	case e.Generation <= s.buried[e.ID] || e.Generation < o.spec.Generation,
		e.Generation == o.spec.Generation && !e.Deadline.Equal(o.spec.Deadline):
		return shim.ObjectState{}, refuse(shim.CodeStaleGeneration, "generation %d of %s is older than %d", e.Generation, e.ID, o.spec.Generation)
	case e.Deadline.Passed(clock.System{}.Now()):
		return shim.ObjectState{}, refuse(shim.CodeExpired, "the deadline of %s has passed", e.ID)
	}
	o.spec.Generation, o.spec.Deadline = e.Generation, e.Deadline
	return o.state(), nil
}

func (s *fakeShim) Put(ctx context.Context, spec shim.Object, f *os.File) (shim.ObjectState, error) {
	for {
		if ctx.Err() != nil {
			return shim.ObjectState{}, fmt.Errorf("cannot put at the shim: %w", ctx.Err())
		}
		o, wait, err := s.accept(spec, f)
		if err != nil {
			return shim.ObjectState{}, err
		}
		if wait == nil {
			wait = o.up
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return shim.ObjectState{}, fmt.Errorf("cannot put at the shim: %w", ctx.Err())
		}
		if o == nil {
			continue
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if o.err != nil {
			return shim.ObjectState{}, o.err
		}
		return o.state(), nil
	}
}

func (s *fakeShim) accept(spec shim.Object, f *os.File) (*fakeObject, <-chan struct{}, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, nil, refuse(shim.CodeBadRequest, "descriptor of %s: %v", spec.ID, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.putErr; err != nil {
		s.putErr = nil
		return nil, nil, err
	}
	buried, known := s.buried[spec.ID]
	switch {
	case s.phase != shim.Running:
		return nil, nil, refuse(shim.CodeNotRunning, "the VM is %s", s.phase)
	case spec.Instance != s.instance:
		return nil, nil, refuse(shim.CodeWrongInstance, "%s is for instance %q of the VM, which is now %q", spec.ID, spec.Instance, s.instance)
	case spec.Deadline.Passed(clock.System{}.Now()):
		return nil, nil, refuse(shim.CodeExpired, "the deadline of %s has passed", spec.ID)
	case known && spec.Generation <= buried:
		return nil, nil, refuse(shim.CodeStaleGeneration, "generation %d of %s was removed", spec.Generation, spec.ID)
	case (spec.SingleFile != "") != (st.Mode&unix.S_IFMT == unix.S_IFREG):
		return nil, nil, refuse(shim.CodeLaunch, "%s is not of the type it is said to be", spec.ID)
	}
	if o := s.objects[spec.ID]; o != nil {
		return s.again(o, spec, &st)
	}
	s.served++
	o := &fakeObject{
		spec: spec, file: st, identity: fmt.Sprint(s.served), phase: shim.Attaching,
		end: make(chan struct{}), up: make(chan struct{}), done: make(chan struct{}),
	}
	s.objects[spec.ID] = o
	over := s.over
	s.tasks.Go(func() { s.serve(o, spec.ID, over) })
	return o, nil, nil
}

func (s *fakeShim) again(o *fakeObject, spec shim.Object, st *unix.Stat_t) (*fakeObject, <-chan struct{}, error) {
	ending := o.ending()
	switch {
	case o.killed:
		return nil, nil, refuse(shim.CodeRetired, "%s was killed in this instance of the VM", spec.ID)
	case spec.Generation < o.spec.Generation:
		return nil, nil, refuse(shim.CodeStaleGeneration, "generation %d of %s is older than %d", spec.Generation, spec.ID, o.spec.Generation)
	case ending && spec.Generation == o.spec.Generation:
		return nil, nil, refuse(shim.CodeStaleGeneration, "generation %d of %s is being removed", spec.Generation, spec.ID)
	case ending:
		return nil, o.done, nil
	}
	same := o.spec
	same.Generation, same.Deadline = spec.Generation, spec.Deadline
	if same != spec || st.Dev != o.file.Dev || st.Ino != o.file.Ino {
		return nil, nil, refuse(shim.CodeBadRequest, "%s exists and is something else", spec.ID)
	}
	o.spec = same
	return o, nil, nil
}

// serve owns an object from its acceptance to its end.
func (s *fakeShim) serve(o *fakeObject, id string, over <-chan struct{}) {
	defer close(o.done)
	ended := refuse(shim.CodeRemoved, "%s was removed", id)
	select {
	case <-time.After(s.attaching):
		s.mu.Lock()
		o.phase = shim.Attached
		close(o.up)
		s.mu.Unlock()
		select {
		case <-o.end:
			s.eject(o, over)
		case <-over:
			ended = refuse(shim.CodeNotRunning, "the VM has ended")
		}
	case <-o.end: // the VMM has never heard of it
	case <-over:
		ended = refuse(shim.CodeNotRunning, "the VM has ended")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	o.phase, o.err = shim.Gone, ended
	select {
	case <-o.up:
	default:
		close(o.up)
	}
	if !o.killed {
		delete(s.objects, id)
	}
	s.bury(id, o.spec.Generation)
}

func (s *fakeShim) eject(o *fakeObject, over <-chan struct{}) {
	s.mu.Lock()
	o.phase = shim.Detaching
	holds := s.holds
	s.mu.Unlock()
	select {
	case <-time.After(s.ejecting):
		if holds {
			s.mu.Lock()
			o.killed = true
			s.mu.Unlock()
		}
	case <-over:
	}
}

func (s *fakeShim) bury(id string, generation uint64) { s.buried[id] = max(s.buried[id], generation) }

func (s *fakeShim) Remove(ctx context.Context, id string, generation uint64) (shim.ObjectState, error) {
	s.mu.Lock()
	if err := s.failure(ctx); err != nil {
		s.mu.Unlock()
		return shim.ObjectState{}, err
	}
	o := s.objects[id]
	if o == nil {
		s.bury(id, generation)
		s.mu.Unlock()
		return shim.ObjectState{ID: id, Generation: generation, Phase: shim.Gone}, nil
	}
	if generation < o.spec.Generation {
		s.mu.Unlock()
		return shim.ObjectState{}, refuse(shim.CodeStaleGeneration, "generation %d of %s is older than %d", generation, id, o.spec.Generation)
	}
	s.bury(id, generation)
	o.stop()
	s.mu.Unlock()
	select {
	case <-o.done:
	case <-ctx.Done():
		return shim.ObjectState{}, fmt.Errorf("cannot remove at the shim: %w", ctx.Err())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return o.state(), nil
}

// lose has the guest eject an object that nobody took away.
func (s *fakeShim) lose(id string) {
	s.mu.Lock()
	o := s.objects[id]
	s.mu.Unlock()
	o.stop()
	<-o.done
}

// put is an object as it was asked for, and whether it exists.
func (s *fakeShim) put(id string) (spec shim.Object, file unix.Stat_t, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := s.objects[id]
	if !ok {
		return shim.Object{}, unix.Stat_t{}, false
	}
	return o.spec, o.file, true
}
