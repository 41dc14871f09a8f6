package kill

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/test/harness"
)

const policy = `package spectrum.grant

allow if {
	input.capability.kind == "fs"
	input.holder.partition == input.partition
}
`

const hostPolicy = `package spectrum.grant

allow if input.requester.kind == "person"

allow if input.action == "delegate"
`

const (
	directories = 6 // of each partition
	clients     = 4
	// declared is the label of what one VM's definition declares.
	declared = "declared"
)

// world is one desktop and what was said of it.
type world struct {
	*harness.Desktop
	model
	t        *testing.T
	part     int
	stats    *statistics
	parts    []harness.Partition
	machines []*machine
	anchors  []ledger.Anchor
	disk     string    // the state directory, where it is a small disk of its own
	begun    time.Time // the last broker's start
	failed   sync.Once
	failure  string
}

func newWorld(t *testing.T, s *statistics, part int) *world {
	t.Helper()
	dir, err := newDir()
	if err != nil {
		t.Fatal(err)
	}
	d, err := harness.New(tools, dir)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Desktop: d, t: t, part: part, stats: s}
	if part%fullDiskEvery == fullDiskEvery-1 {
		if err := w.smallDisk(); err != nil {
			t.Fatal(err)
		}
	}
	w.names = map[uuid.UUID]*named{}
	d.BrokerArgs = []string{
		"--boot-grace", "1ms", "--cut-deadline", "300ms", "--guest-requests", "1000000", "--guest-burst", "1000000",
	}
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(d.HostPolicy("host.rego", hostPolicy))
	files := map[string]string{}
	for i := range directories {
		files[fmt.Sprintf("d%d/file", i)] = "content\n"
	}
	for range 2 {
		p, err := d.AddPartition(files, map[string]string{"grant.rego": policy})
		must(err)
		w.parts = append(w.parts, p)
		w.names[p.ID] = &named{}
	}
	for i, v := range []struct{ toml, cmdline string }{
		{toml: "[[grant]]\ncapability = \"fs:ro:self:/d0\"\nlabel = \"" + declared + "\"\n"},
		{},
		{cmdline: "hold"}, // its guest lets go of nothing
	} {
		p := w.parts[i%2]
		id, err := d.AddVM(p, fmt.Sprintf("vm%d", i), "memory_mib = 32\n"+v.toml)
		must(err)
		must(os.WriteFile(filepath.Join(p.Dir, "svc/data", fmt.Sprintf("vm%d", i), "cmdline"), []byte(v.cmdline+"\n"), 0o644)) //nolint:gosec // as a partition has it
		w.machines = append(w.machines, &machine{id: id, name: fmt.Sprintf("vm%d", i), part: p.ID, dir: d.VMDir(id)})
	}
	return w
}

// failf keeps the first thing that was wrong.
func (w *world) failf(format string, args ...any) {
	w.failed.Do(func() { w.failure = fmt.Sprintf(format, args...) })
}

func (w *world) seenFile() string { return filepath.Join(w.Dir, "seen") }

// survive kills the broker so often, and then looks for what is left.
func (w *world) survive(times int) {
	t := w.t
	defer w.end()
	for until, number := w.stats.kills+times, uint64(0); w.stats.kills < until && !t.Failed() && !interrupted.Load(); number++ {
		r := choices(uint64(w.part), number)
		if err := w.live(r, w.choose(r, number)); err != nil {
			t.Error(err)
		}
		if w.failure != "" {
			t.Error(w.failure)
		}
		w.stats.tell()
	}
	if t.Failed() {
		return
	}
	// A last one, for what the last kill left.
	w.BrokerEnv = []string{"SPECTRUM_FAILPOINTS_SEEN=" + w.seenFile()}
	if err := w.start(); err != nil {
		t.Error(err)
	} else if err := w.compare(); err != nil {
		t.Error(err)
	}
}

func (w *world) start() error {
	ctx, cancel := context.WithTimeout(context.Background(), w.Stretched(30*time.Second))
	defer cancel()
	w.begun = time.Now()
	return w.StartBroker(ctx)
}

// end closes the desktop. Its end is a test too: nothing may be left.
func (w *world) end() {
	t := w.t
	if t.Failed() {
		w.locked(func() { t.Logf("the last operations:\n  %s", strings.Join(w.log, "\n  ")) })
		if log, err := os.ReadFile(filepath.Join(w.Dir, "broker.log")); err == nil {
			t.Logf("the end of the broker's log:\n%s", log[max(0, len(log)-8<<10):])
		}
	}
	if err := w.Close(); err != nil {
		t.Errorf("the desktop did not close: %v", err)
	}
	collectZombies(0)
	if left := w.Leftovers(w.Stretched(10 * time.Second)); len(left) > 0 {
		t.Errorf("left behind:\n  %s", strings.Join(left, "\n  "))
	}
	if left := descendants(); len(left) > 0 {
		t.Errorf("left behind:\n  %s", strings.Join(describe(left), "\n  "))
	}
	if left := w.cgroups(); len(left) > 0 {
		t.Errorf("left behind: cgroups %q", left)
	}
	if err := w.verify(); err != nil {
		t.Error(err)
	}
	if err := w.stats.addSeen(w.seenFile()); err != nil {
		t.Error(err)
	}
	if w.disk != "" {
		if err := unix.Unmount(w.disk, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
		_ = os.Remove(w.disk)
	}
	if !t.Failed() {
		if err := os.RemoveAll(w.Dir); err != nil {
			t.Error(err)
		}
	}
}

// plan is how a life of the broker ends.
type plan struct {
	label string // the failpoint at which it is killed; "": none
	count int
	// starting: it is killed so long after its start; 0: not while it starts.
	starting time.Duration
	// operations that are done before it is killed, where nothing else killed it.
	operations int
	// shim: a shim is killed half-way.
	shim bool
	// full: the state directory's disk is full from half-way on.
	full bool
	// busy: so much is recorded that the ledger's log is moved.
	busy bool
	// told: it is told to end, and not killed unless at its failpoint.
	told bool
}

func (p plan) String() string {
	switch {
	case p.label != "":
		return fmt.Sprintf("killed at failpoint %s, hit %d, or after %d operations", p.label, p.count, p.operations)
	case p.starting != 0:
		return fmt.Sprintf("killed %v after its start", p.starting)
	}
	return fmt.Sprintf("killed after %d operations (and a shim: %v, on a full disk: %v, told to end: %v)", p.operations, p.shim, p.full, p.told)
}

// choose makes the plan of one life. Failpoints come one after another in an
// order of the seed's, so that in a run of 200 each has its turn.
func (w *world) choose(r *rand.Rand, number uint64) plan {
	p := plan{operations: 1 + r.IntN(30)}
	switch n := r.IntN(10); {
	case n < 6 || number == 0:
		turns := w.stats.turns()
		turn := w.part*killsInPart + int(number) //nolint:gosec // small
		p.label = turns[turn%len(turns)]
		if number == 0 {
			// The first start of all makes what later ones find.
			p.label = firstSteps[r.IntN(len(firstSteps))]
		}
		p.count = []int{1, 1, 1, 1, 2, 2, 3, 5}[r.IntN(8)]
		p.operations = 25
	case n == 6:
		p.starting = time.Duration(1+r.IntN(400)) * time.Millisecond
	case n == 7:
		p.shim = true
	}
	if number == 1 && w.disk == "" {
		p = plan{label: "ledger.tidy.after", count: 1, operations: 25, busy: true}
	}
	p.told = p.label != "" && strings.HasPrefix(p.label, "close.")
	if w.disk != "" && r.IntN(2) == 0 {
		p.starting, p.full, p.operations = 0, true, 40
		if p.label == "" || r.IntN(2) == 0 {
			p.label, p.count = onFullDisk[r.IntN(len(onFullDisk))], 1+r.IntN(2)
		}
	}
	if left, _ := os.ReadDir(filepath.Join(w.Dir, "run", "tombstones")); len(left) > 0 && r.IntN(2) == 0 {
		// Only this start records what the last broker could not.
		p = plan{label: []string{"tombstone.recorded", "tombstone.removed"}[r.IntN(2)], count: 1, operations: 25}
	}
	return p
}

// onFullDisk are failpoints of a broker that cannot write.
var onFullDisk = []string{"", "ledger.reopen.before", "tombstone.before", "tombstone.made", "tombstone.written", "tombstone.recorded", "tombstone.removed"}

// turns are the failpoints that any life may come by, in the seed's order.
func (s *statistics) turns() []string {
	var out []string
	for _, i := range choices().Perm(len(s.labels)) {
		name := s.labels[i].Name
		if !slices.Contains(firstSteps, name) && !slices.Contains(onFullDisk, name) {
			out = append(out, name)
		}
	}
	return out
}

// firstSteps are failpoints of a broker that has no state yet.
var firstSteps = []string{
	"ledger.lock.after", "ledger.file.made", "ledger.migrate.before", "ledger.migrate.after", "ledger.settle.after",
	"key.marked", "key.written", "key.staged", "key.promote.before", "key.promote.after", "bind.before",
}

// ofShim tells whether a label is one that shims and launchers come by.
func (p plan) ofShim() bool {
	return strings.HasPrefix(p.label, "shim.") || strings.HasPrefix(p.label, "launch.")
}

// toward is the operation that comes by the label, where hardly any other does.
func (p plan) toward() operation {
	switch {
	case strings.HasPrefix(p.label, "ledger.archive."), strings.HasPrefix(p.label, "ledger.rotate."), p.label == "ledger.rewrite.cleared":
		return (*life).rotateAudit
	case strings.HasPrefix(p.label, "key."), strings.HasPrefix(p.label, "ledger.anchor."):
		return (*life).rotateKeys
	}
	return nil
}

// live starts a broker, holds what it says against the model, lets clients loose
// on it, and sees it killed.
func (w *world) live(r *rand.Rand, p plan) error {
	w.note("--- life: %v", p)
	w.BrokerEnv = []string{"SPECTRUM_FAILPOINTS_SEEN=" + w.seenFile()}
	if p.label != "" {
		w.BrokerEnv = append(w.BrokerEnv, fmt.Sprintf("SPECTRUM_FAILPOINTS=%s:%d:kill", p.label, p.count))
	}
	early := make(chan struct{})
	if p.starting != 0 {
		before := w.BrokerPID()
		go func() {
			defer close(early)
			time.Sleep(p.starting)
			if pid := w.BrokerPID(); pid != before && pid != 0 {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}()
	} else {
		close(early)
	}
	err := w.start()
	ready := time.Since(w.begun)
	<-early
	w.collect()
	if w.killed() {
		w.count(p, err != nil)
		return nil
	}
	if err != nil {
		return fmt.Errorf("%v: %w", p, err)
	}
	w.stats.ready = append(w.stats.ready, ready)
	if err = w.compare(); err != nil {
		// A broker that dies stops answering before its end is seen.
		select {
		case <-w.BrokerExited():
		case <-time.After(time.Second):
		}
	}
	if w.killed() {
		w.count(p, false) // by what was asked of it while comparing; the next life compares
		return nil
	}
	if err != nil {
		return fmt.Errorf("%v: %w", p, err)
	}
	byItself := w.loose(r, p)
	killed := w.BrokerSignal() == syscall.SIGKILL
	if err := w.StopBroker(syscall.SIGKILL); err != nil {
		return err
	}
	w.collect()
	if !byItself {
		p.label = ""
	}
	if killed {
		w.count(p, false)
	}
	return nil
}

// killed tells whether the broker has ended. It only ever does by being killed:
// any other end is a failure of its start.
func (w *world) killed() bool {
	if w.BrokerPID() == 0 {
		return true
	}
	select {
	case <-w.BrokerExited():
		return w.BrokerSignal() == syscall.SIGKILL
	default:
		return false
	}
}

func (w *world) count(p plan, starting bool) {
	s := w.stats
	s.kills++
	if p.label != "" {
		s.atLabel++
	} else {
		s.atMoment++
	}
	if starting || p.starting != 0 {
		s.atStart++
	}
}

// loose lets the clients loose until the broker is dead or enough was done, and
// tells whether it died of its failpoint.
func (w *world) loose(r *rand.Rand, p plan) (byItself bool) {
	l := &life{world: w, armedShims: p.ofShim(), toward: p.toward()}
	ctx, cancel := context.WithTimeout(context.Background(), w.Stretched(60*time.Second))
	defer cancel()
	var wg sync.WaitGroup
	for range clients {
		own := rand.New(rand.NewPCG(r.Uint64(), r.Uint64())) //nolint:gosec // to be replayed
		wg.Go(func() { l.client(ctx, own) })
	}
	moment := time.Duration(r.IntN(30)) * time.Millisecond
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	// An armed failpoint that nobody comes by must not hold up the run.
	patience := 600 * time.Millisecond
	if p.full || p.busy {
		patience = w.Stretched(4 * time.Second)
	}
	limit := time.After(patience)
wait:
	for int(l.done.Load()) < p.operations {
		select {
		case <-w.BrokerExited():
			break wait
		case <-limit:
			break wait
		case <-tick.C:
		}
		if p.full && int(l.done.Load()) >= p.operations/4 {
			p.full = false
			l.fill(ctx)
		}
		if p.busy {
			p.busy = false
			l.renameOften(ctx, 1200)
		}
		if p.shim && int(l.done.Load()) >= p.operations/2 && l.killShim(r) {
			p.shim = false
		}
	}
	time.Sleep(moment)
	select {
	case <-w.BrokerExited():
		byItself = true
	default:
		w.finish(p.told)
		byItself = p.told && w.BrokerSignal() == syscall.SIGKILL
	}
	wg.Wait()
	w.empty()
	w.stats.operations += int(l.done.Load())
	w.stats.acknowledged += int(l.acked.Load())
	w.stats.unrecorded += int(l.unrecorded.Load())
	return byItself
}

// finish kills the broker, or tells it to end.
func (w *world) finish(told bool) {
	if told {
		_ = syscall.Kill(w.BrokerPID(), syscall.SIGTERM)
		select {
		case <-w.BrokerExited():
			return
		case <-time.After(w.Stretched(20 * time.Second)):
			w.failf("the broker did not end within %v when told to", w.Stretched(20*time.Second))
		}
	}
	_ = syscall.Kill(w.BrokerPID(), syscall.SIGKILL)
	<-w.BrokerExited()
}

// fullDiskEvery: one part in so many has a disk that can be full.
const fullDiskEvery = 4

// smallDisk puts the state directory on a disk of its own.
func (w *world) smallDisk() error {
	dir, err := newDir()
	if err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8m,mode=0700"); err != nil {
		return fmt.Errorf("cannot mount a small disk: %w", err)
	}
	w.disk, w.State = dir, dir
	return nil
}

// fill leaves no room on the small disk, also not what the ledger had reserved.
func (l *life) fill(ctx context.Context) {
	err := os.WriteFile(filepath.Join(l.disk, "ballast"), make([]byte, 16<<20), 0o600)
	l.note("the disk is full: %v", err)
	l.full.Store(true)
	l.renameOften(ctx, 5000)
}

// renameOften names a partition so often, or until it is refused.
func (l *life) renameOften(ctx context.Context, times int) {
	p := l.parts[0]
	n := l.names[p.ID]
	n.busy.Lock()
	defer n.busy.Unlock()
	for i := range times {
		name := fmt.Sprintf("p%d-a", i)
		l.locked(func() { n.asked = name })
		if _, err := l.Client.SetName(ctx, name, p.ID); err != nil {
			l.note("named %s %d times until %v", p.ID, i, err)
			return
		}
		l.locked(func() { n.is, n.asked = name, "" })
	}
}

func (w *world) empty() {
	if w.disk != "" {
		_ = os.Remove(filepath.Join(w.disk, "ballast"))
	}
}

// mustBeGone asserts that nothing of a grant gives access any more, right after
// the broker said so.
func (w *world) mustBeGone(ctx context.Context, vm, id uuid.UUID) {
	m := w.machineOf(vm)
	if m == nil {
		return
	}
	for _, o := range w.objects(ctx, m) {
		if o.ID == "fs-"+id.String() && len(o.PIDs) > 0 {
			w.failf("grant %s is said to be revoked, and %v of VM %s still serves it", id, o.PIDs, m.name)
		}
	}
}

func (w *world) machineOf(id uuid.UUID) *machine {
	for _, m := range w.machines {
		if m.id == id {
			return m
		}
	}
	return nil
}
