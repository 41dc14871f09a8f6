package ledger

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/test/powercut"
)

var (
	cutSeed = flag.Uint64("powercut.seed", 0, "seed of the power cuts; 0: a new one")
	cutRuns = flag.Int("powercut.runs", 12, "how many writers lose their power, each with several outcomes")
)

// childStory tells a re-executed test binary to write to a ledger, in JSON.
const childStory = "LEDGER_TEST_STORY"

// story is what a writer does until its power is cut.
type story struct {
	Dir         string
	Seed        uint64
	Synchronous string
	Writers     int
	Steps       int // of each; 0: for ever
}

// tellStory writes to a ledger and says what was acknowledged.
func tellStory(text string) {
	var s story
	fail := func(err error) {
		fmt.Println("error", err)
		os.Exit(1)
	}
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		fail(err)
	}
	l, err := Open(context.Background(), Options{Dir: s.Dir, Kinds: testKinds, Clock: clock.System{}, synchronous: s.Synchronous})
	if err != nil {
		fail(err)
	}
	c, err := testKinds.Parse("fs:ro:"+partition.String()+":/a", nil)
	if err != nil {
		fail(err)
	}
	var saying sync.Mutex
	say := func(what string, id uuid.UUID) {
		saying.Lock()
		defer saying.Unlock()
		fmt.Println(what, id)
	}
	if s.Synchronous == "" {
		// As shipped, what is known outside of the database is never ahead of it.
		go func() {
			for l.Mark() == nil {
				time.Sleep(time.Millisecond)
			}
		}()
	}
	var writers sync.WaitGroup
	for w := range s.Writers {
		writers.Go(func() {
			r := rand.New(rand.NewPCG(s.Seed, uint64(w)))
			var mine []uuid.UUID
			for i := 0; s.Steps == 0 || i < s.Steps; i++ {
				if len(mine) > 0 && r.IntN(3) == 0 {
					id := mine[len(mine)-1]
					mine = mine[:len(mine)-1]
					if try(l, NewChange(GrantRevoking, someone, id, Change{Reason: "r"})) == nil {
						say("revoked", id)
					}
					continue
				}
				id := uuid.New()
				// Of any size, so that pages fill up at different moments.
				decision := []byte(`"` + strings.Repeat("x", r.IntN(6000)) + `"`)
				if try(l, requested(id, GrantRecord{Capability: c, Decision: decision})) == nil {
					say("granted", id)
					mine = append(mine, id)
				}
			}
		})
	}
	writers.Wait()
	if err := l.Close(); err != nil {
		fail(err)
	}
	fmt.Println("end")
	os.Exit(0)
}

// acknowledged is the model: what a writer was told.
type acknowledged struct{ granted, revoked map[uuid.UUID]bool }

// judge opens what a power cut left, and says what is wrong with it: what was
// acknowledged is lost, what was revoked is alive, or it does not open.
func (a acknowledged) judge(dir string) error {
	l, err := Open(context.Background(), Options{Dir: dir, Kinds: testKinds, Clock: clock.System{}})
	if err != nil {
		return fmt.Errorf("it does not open: %w", err)
	}
	defer l.Close()
	for id := range a.granted {
		if stateOf(l, id) == "" {
			return fmt.Errorf("grant %s was acknowledged and is lost", id)
		}
	}
	for id := range a.revoked {
		if got := stateOf(l, id); got != Revoking {
			return fmt.Errorf("grant %s was revoked and is %q", id, got)
		}
	}
	if err := try(l, Event{Type: BrokerStarted, Actor: someone}); err != nil {
		return fmt.Errorf("it cannot be written: %w", err)
	}
	return l.Close()
}

// cutDisk is a disk that a ledger lives on, from power cut to power cut.
type cutDisk struct {
	t     testing.TB
	disk  *powercut.Disk
	told  acknowledged
	fast  string // a directory in memory
	tried int
}

func newCutDisk(t testing.TB) *cutDisk {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: NO POWER CUT is tested: it takes root to mount a file system")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("SKIP: NO POWER CUT is tested: this machine has no FUSE: %v", err)
	}
	fast := t.TempDir()
	if err := syscall.Mount("tmpfs", fast, "tmpfs", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(fast, syscall.MNT_DETACH) })
	return &cutDisk{t: t, disk: powercut.New(), told: acknowledged{map[uuid.UUID]bool{}, map[uuid.UUID]bool{}}, fast: fast}
}

// run has a writer of its own process, which the power takes away at a change,
// and tells whether it came to its end before.
func (c *cutDisk) run(s story, stopAt int) (ended bool) {
	c.t.Helper()
	m, err := c.disk.Mount(c.t.TempDir())
	if err != nil {
		c.t.Fatal(err)
	}
	c.disk.StopAt(stopAt)
	s.Dir = filepath.Join(m.Dir, "state")
	text, err := json.Marshal(s)
	if err != nil {
		c.t.Fatal(err)
	}
	cmd := exec.CommandContext(c.t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childStory+"="+string(text))
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		c.t.Fatal(errors.Join(err, m.Close()))
	}
	said := make(chan error, 1)
	go func() { said <- c.listen(bufio.NewScanner(out), &ended) }()
	kill := func() { _ = cmd.Process.Kill() }
	select {
	case <-c.disk.Off():
		err = m.PowerCut(kill)
		err = errors.Join(err, <-said)
	case err = <-said:
		err = errors.Join(err, m.PowerCut(kill))
	case <-time.After(2 * time.Minute):
		err = errors.Join(errors.New("the writer neither ends nor comes to the change"), m.PowerCut(kill))
	}
	_ = cmd.Wait()
	if err != nil {
		c.t.Fatal(err)
	}
	return ended
}

func (c *cutDisk) listen(lines *bufio.Scanner, ended *bool) error {
	for lines.Scan() {
		what, rest, _ := strings.Cut(lines.Text(), " ")
		id, _ := uuid.Parse(rest)
		switch what {
		case "granted":
			c.told.granted[id] = true
		case "revoked":
			c.told.revoked[id] = true
		case "end":
			*ended = true
		default:
			return fmt.Errorf("the writer says %q", lines.Text())
		}
	}
	return nil
}

// cut takes the power away, with one outcome, and judges it.
func (c *cutDisk) cut(r *rand.Rand, loss powercut.Loss) (*powercut.Disk, error) {
	c.t.Helper()
	after := c.disk.Cut(r, loss)
	c.tried++
	dir := filepath.Join(c.fast, strconv.Itoa(c.tried))
	if err := errors.Join(os.Mkdir(dir, 0o700), after.Export(dir)); err != nil {
		c.t.Fatal(err)
	}
	if err := c.told.judge(filepath.Join(dir, "state")); err != nil {
		return after, fmt.Errorf("%s: %w; the last changes: %s", loss, err, c.disk.Recent())
	}
	return after, os.RemoveAll(dir)
}

// TestPowerCutAtBirth takes the power away at every change of a ledger's first
// moments: from the making of its directory to its end.
func TestPowerCutAtBirth(t *testing.T) {
	stride := 1
	if raceDetector {
		stride = 5
	}
	for stop := 1; ; stop += stride {
		c := newCutDisk(t)
		ended := c.run(story{Seed: 1, Writers: 1, Steps: 5}, stop)
		for i, loss := range powercut.Losses {
			if _, err := c.cut(rand.New(rand.NewPCG(uint64(stop), uint64(i))), loss); err != nil {
				t.Fatalf("the power went at change %d: %v", stop, err)
			}
		}
		if ended {
			if stop < 20 {
				t.Errorf("a ledger lived on %d changes", stop)
			}
			return
		}
	}
}

// powerCuts has a ledger live through many power cuts, and returns the first
// thing that is wrong.
func powerCuts(t *testing.T, seed uint64, runs int, synchronous string) (cuts int, wrong error) {
	c := newCutDisk(t)
	r := rand.New(rand.NewPCG(seed, 0))
	for run := range runs {
		s := story{Seed: seed + uint64(run), Synchronous: synchronous, Writers: 1 + 7*r.IntN(2)}
		// Mostly short, so that many cuts fall on the opening; some long enough
		// for SQLite to bring its log into the database by itself.
		stop := 1 + r.IntN(200)
		if run%6 == 5 {
			stop = 1500 + r.IntN(1500)
		}
		c.run(s, stop)
		var next []*powercut.Disk
		for range 2 {
			for _, loss := range powercut.Losses {
				after, err := c.cut(rand.New(rand.NewPCG(r.Uint64(), 0)), loss)
				if err != nil {
					return cuts, fmt.Errorf("run %d of %d writers, stopped at change %d: %w", run, s.Writers, stop, err)
				}
				cuts++
				next = append(next, after)
			}
		}
		// What is there is on record, whether or not anybody was told.
		c.disk = next[r.IntN(len(next))]
	}
	return cuts, nil
}

// TestPowerCut loses nothing that was acknowledged, brings back nothing that was
// revoked, and always opens again.
func TestPowerCut(t *testing.T) {
	seed := *cutSeed
	if seed == 0 {
		seed = rand.Uint64()>>1 + 1
	}
	cuts, err := powerCuts(t, seed, *cutRuns, "")
	if err != nil {
		t.Fatalf("%v\nagain with -powercut.seed=%d -powercut.runs=%d", err, seed, *cutRuns)
	}
	t.Logf("%d power cuts, seed %d", cuts, seed)
}

// TestPowerCutIsNoticed turns down what the promise rests on, and wants the same
// cuts to find out: within 8 runs, of which the shipped ledger stands hundreds.
// Without any sync it may be the file itself that is lost, and with it everything.
func TestPowerCutIsNoticed(t *testing.T) {
	lost := []string{"was acknowledged and is lost", "was revoked and is"}
	for synchronous, wants := range map[string][]string{"OFF": append(lost, "it does not open"), "NORMAL": lost} {
		_, err := powerCuts(t, 7, 8, synchronous)
		if err == nil || !slices.ContainsFunc(wants, func(want string) bool { return strings.Contains(err.Error(), want) }) {
			t.Errorf("synchronous=%s: %v; want it caught by what was lost", synchronous, err)
		}
	}
}
