package kill

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"spectrum-os.org/broker/test/harness"
	"spectrum-os.org/broker/test/labels"
	"spectrum-os.org/broker/vmm/vmmtest"
)

var (
	tools     harness.Tools
	kills     int
	seed      uint64
	firstPart int
	source    string
	progress  time.Duration

	interrupted atomic.Bool
)

// killsInPart is how many kills one desktop lives through. Then a new one is
// made, so that the first start is killed too and no ledger grows without end.
const killsInPart = 40

// mostFailures is after how many parts that failed a run is given up.
const mostFailures = 5

// TestMain lets the test binary be the VMM.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "--api-socket" {
		os.Exit(vmmtest.Main(os.Args[1:]))
	}
	tools.Register(flag.CommandLine)
	flag.IntVar(&kills, "kills", 200, "how often the broker is killed")
	flag.Uint64Var(&seed, "seed", 0, "seed of all choices; 0 takes one from the clock")
	flag.IntVar(&firstPart, "part", 0, "the desktop to begin with: a failure names its own")
	flag.StringVar(&source, "source", "", "the source tree that the programs were built from, for its failpoints")
	flag.DurationVar(&progress, "progress", 0, "say how it goes this often; 0: never")
	flag.Parse()
	// Whoever gives up a long run gets a desktop that is closed in good order.
	told := make(chan os.Signal, 1)
	signal.Notify(told, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-told
		interrupted.Store(true)
	}()
	os.Exit(m.Run())
}

// needTools skips, loudly, where the flags do not say what to run.
func needTools(t *testing.T) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The VMM's "kernel" is only ever read.
	tools.VMM, tools.Kernel, tools.Initramfs = self, self, self
	// There is no use for a command line here.
	tools.Cap = self
	if err := tools.Missing(); err != nil {
		t.Skipf("SKIP needs the programs under test (test/README.md): %v", err)
	}
	if source == "" {
		t.Skip("SKIP -source names no source tree, so that the failpoints are not known")
	}
}

// TestKills kills the broker -kills times.
func TestKills(t *testing.T) {
	needTools(t)
	all, err := labels.Of(source)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Concat(firstSteps, onFullDisk) {
		if name != "" && !slices.ContainsFunc(all, func(l labels.Label) bool { return l.Name == name }) {
			t.Errorf("%s is armed, and is no failpoint: nobody dies of it", name)
		}
	}
	// Whatever outlives its parent becomes a child of this process, where it is
	// seen.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	if seed == 0 {
		seed = uint64(time.Now().UnixNano()) % 1_000_000
	}
	t.Logf("seed %d: %s", seed, again(firstPart))
	s := newStatistics(all)
	defer func() { t.Log(s.String()) }()
	failed := 0
	for part := firstPart; s.kills < kills && failed < mostFailures && !interrupted.Load(); part++ {
		w := newWorld(t, s, part)
		ok := t.Run(fmt.Sprintf("part %d", part), func(t *testing.T) {
			w.t = t
			w.survive(min(killsInPart, kills-s.kills))
		})
		if !ok {
			failed++
			t.Logf("to replay the choices of part %d: %s", part, again(part))
		}
	}
	if interrupted.Load() {
		t.Fatal("interrupted")
	}
	if firstPart == 0 && kills >= 200 && failed == 0 {
		s.everyLabelWasHit(t)
		for _, op := range mustSucceed {
			if s.byOperation[op] == 0 {
				t.Errorf("no broker acknowledged a single %s in this run, so that nothing was shown of it", op)
			}
		}
	}
	t.Logf("acknowledged: %v", s.byOperation)
}

// again is how the same choices are made again.
func again(part int) string {
	return fmt.Sprintf("make soak KILLS=%d SEED=%d PART=%d", min(killsInPart, max(kills-part*killsInPart, 1)), seed, part)
}

// choices is the random source of one part, and of one of its lives.
func choices(numbers ...uint64) *rand.Rand {
	a, b := seed, uint64(0)
	for _, n := range numbers {
		a, b = a*0x9e3779b97f4a7c15+n, b*31+n+1
	}
	return rand.New(rand.NewPCG(a, b)) //nolint:gosec // to be replayed
}

// statistics are of the whole run.
type statistics struct {
	labels []labels.Label
	seen   map[string]bool
	begun  time.Time
	told   time.Time

	kills, atLabel, atMoment, atStart, shims int
	byLabel                                  map[string]int
	byOperation                              map[string]int // acknowledged; under the model's mutex
	operations, acknowledged, comparisons    int
	unrecorded                               int // revocations that cut access on a full disk
	ready                                    []time.Duration
}

func newStatistics(all []labels.Label) *statistics {
	return &statistics{labels: all, seen: map[string]bool{}, begun: time.Now(), told: time.Now(), byLabel: map[string]int{}, byOperation: map[string]int{}}
}

func (s *statistics) String() string {
	slices.Sort(s.ready)
	var half, worst time.Duration
	if n := len(s.ready); n > 0 {
		half, worst = s.ready[n/2], s.ready[n-1]
	}
	return fmt.Sprintf("%d kills in %v: %d of them at a failpoint, %d at a random moment, and of either %d while starting; "+
		"shims and launchers included, %d failpoints killed somebody; %d shims killed besides; %d operations, %d acknowledged, %d revocations on a full disk; %d comparisons; ready after %v (median), %v (worst)",
		s.kills, time.Since(s.begun).Round(time.Second), s.atLabel, s.atMoment, s.atStart, len(s.byLabel), s.shims,
		s.operations, s.acknowledged, s.unrecorded, s.comparisons, half.Round(time.Millisecond), worst.Round(time.Millisecond))
}

func (s *statistics) tell() {
	if progress > 0 && time.Since(s.told) >= progress {
		s.told = time.Now()
		fmt.Println(s.String())
	}
}

// mustSucceed are the operations that a run of 200 kills sees acknowledged.
var mustSucceed = []string{
	"grant", "delegate", "delegateFrom", "request", "derive", "renew", "revoke", "drop", "start", "stop", "rename",
	"rotateKeys", "revokeKey", "rotateAudit",
}

// unreached are the failpoints that this harness does not come by, and why.
var unreached = map[string]string{}

// everyLabelWasHit fails where a failpoint is dead, so that it proves nothing.
func (s *statistics) everyLabelWasHit(t *testing.T) {
	t.Helper()
	for _, l := range s.labels {
		_, excused := unreached[l.Name]
		switch {
		case !s.seen[l.Name] && !excused:
			t.Errorf("%s: nothing came by the failpoint %s in this run: exercise it, or say in unreached why not", l.At, l.Name)
		case s.seen[l.Name] && excused:
			t.Errorf("%s: the failpoint %s is listed in unreached, and was hit", l.At, l.Name)
		}
	}
	for name := range unreached {
		if !slices.ContainsFunc(s.labels, func(l labels.Label) bool { return l.Name == name }) {
			t.Errorf("unreached lists %s, which is no failpoint", name)
		}
	}
}

// addSeen takes in what the processes of a part came by, and died of.
func (s *statistics) addSeen(path string) error {
	raw, err := os.ReadFile(path)
	for line := range strings.Lines(string(raw)) {
		label, killed := strings.CutSuffix(strings.TrimSpace(line), " killed")
		s.seen[label] = true
		if killed {
			s.byLabel[label]++
		}
	}
	return err
}

// newDir makes a directory with a short path, as sockets are beneath it.
func newDir() (string, error) {
	dir, err := os.MkdirTemp("", "kill-")
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(dir)
}
