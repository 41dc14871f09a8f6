package kill

import (
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
)

// grant is what was said of one grant. Its label is its own in the part, so
// that it is known again also where no answer told its id.
type grant struct {
	label    string
	vm       *machine
	persist  bool
	parent   *grant
	token    string
	spelling string
	lease    bool      // it ends by itself
	counted  bool      // likewise, when it is used up
	expires  time.Time // zero: never, or not known
	later    bool      // it may have been renewed
	key      string    // that signs for it; "": not known
	keyMoves int       // of the model, when it was asked for
	id       uuid.UUID // Nil: nobody said

	given  bool // acknowledged
	mayEnd bool // somebody asked for its end, or for one that includes it
	ended  bool // that was acknowledged, or the request was refused
	doomed bool // what it was tied to was killed: it has ended once a broker is ready again
}

func live(s api.GrantState) bool { return s == api.GrantPending || s == api.GrantActive }

// wrong is the model: what was acknowledged stays so, what was not may be
// either. What has ended may be in an archive, and nowhere else.
func (g *grant) wrong(state api.GrantState, exists, archived bool, now time.Time) string {
	over := g.counted || g.lease && !now.Before(g.expires)
	stays := g.given && !g.ended && !g.mayEnd && !over
	switch {
	case g.ended && exists && live(state):
		return "its end was acknowledged, and it is " + string(state)
	case g.doomed && exists && live(state):
		return "its VM was killed, and it is " + string(state)
	case g.given && !exists && !archived:
		return "it was acknowledged, and is lost"
	case stays && !exists:
		return "it was acknowledged, nobody took it back, and it is in an archive only"
	case stays && !live(state):
		return "it was acknowledged, nobody took it back, and it is " + string(state)
	}
	return ""
}

// machine is what was said of one VM.
type machine struct {
	id   uuid.UUID
	name string
	part uuid.UUID // its partition
	dir  string    // its runtime directory
	busy sync.Mutex

	on    bool
	run   string
	maybe bool // it may be neither: something that changes it was asked or done
	shim  int  // its shim's process when it was last seen
	// armed: it has a shim that was started with a failpoint, and may die of it.
	armed bool
}

// runs tells whether a VM does. One whose guest held on to a device still does.
func runs(v api.VM) bool { return v.State == api.VMRunning || v.State == api.VMDegraded }

func (m *machine) wrong(v api.VM) string {
	switch {
	case m.maybe || m.armed:
	case m.on && (!runs(v) || v.Instance != m.run):
		return fmt.Sprintf("it was left running in run %s, and is %s in run %q", m.run, v.State, v.Instance)
	case !m.on && runs(v):
		return fmt.Sprintf("it was stopped, and is %s", v.State)
	}
	return ""
}

// named is what was said of a partition's petname.
type named struct {
	busy  sync.Mutex
	is    string
	asked string // "": nothing that was not answered
}

// model is all that the clients were told, under its mutex.
type model struct {
	mu     sync.Mutex
	grants []*grant
	names  map[uuid.UUID]*named
	keys   []*key // that were acknowledged, oldest first
	// current is the key that signs; "": it is being changed, or that was not
	// answered. keyMoves rises whenever that begins and ends.
	current  string
	keyMoves int
	keysBusy sync.Mutex
	serial   int
	log      []string // of the last operations
}

func (m *model) locked(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
}

// note keeps what an operation was and what was answered.
func (m *model) note(format string, args ...any) {
	const most = 120
	line := time.Now().Format("15:04:05.000 ") + fmt.Sprintf(format, args...)
	m.locked(func() {
		if m.log = append(m.log, line); len(m.log) > most {
			m.log = m.log[len(m.log)-most:]
		}
	})
}

// ask says that a grant is being asked for.
func (m *model) ask(vm *machine, persist, lease bool, parent *grant) *grant {
	g := &grant{vm: vm, persist: persist, lease: lease || parent != nil && parent.lease, counted: parent != nil && parent.counted, parent: parent}
	m.locked(func() {
		m.serial++
		g.label = fmt.Sprintf("k%d", m.serial)
		// What ends its VM is under way.
		g.mayEnd = vm.maybe || vm.armed || !vm.on || parent != nil && parent.mayEnd
		g.key, g.keyMoves = m.current, m.keyMoves
		m.grants = append(m.grants, g)
	})
	return g
}

// ending says that the end of grants is being asked for, and with it that of
// what derives from them.
func (m *model) ending(gs ...*grant) {
	m.locked(func() {
		for _, g := range gs {
			g.mayEnd = true
		}
		for _, g := range m.grants { // a parent is always before its children
			if g.parent != nil && g.parent.mayEnd {
				g.mayEnd = true
			}
		}
	})
}

// gone says that the end of grants was acknowledged.
func (m *model) gone(gs ...*grant) {
	m.locked(func() {
		for _, g := range gs {
			g.ended = true
		}
		for _, g := range m.grants {
			if g.given && g.parent != nil && g.parent.ended {
				g.ended = true
			}
		}
	})
}

// disturb says that a VM is about to change: what is tied to its run may end.
func (m *model) disturb(vm *machine) (tied []*grant) {
	m.locked(func() {
		vm.maybe = true
		for _, g := range m.grants {
			// What persists outlives its VM, unless a failpoint of the shim makes
			// its application fail.
			if g.vm != vm || g.ended || g.persist && !vm.armed {
				continue
			}
			g.mayEnd = true
			if !g.persist && g.given {
				tied = append(tied, g)
			}
		}
	})
	m.ending()
	return tied
}

// pick returns the grants that f selects.
func (m *model) pick(f func(g *grant) bool) (out []*grant) {
	m.locked(func() {
		for _, g := range m.grants {
			if f(g) {
				out = append(out, g)
			}
		}
	})
	return out
}
