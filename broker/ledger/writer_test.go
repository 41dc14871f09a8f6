package ledger

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/clock"
)

// childDir tells a re-executed test binary to write to a ledger until it is
// killed, and to say which grants were acknowledged.
const childDir = "LEDGER_TEST_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		writeUntilKilled(dir)
	}
	if story := os.Getenv(childStory); story != "" {
		tellStory(story)
	}
	if raceDetector {
		// Before the command line is read, which may still ask for more.
		if err := flag.Set("rapid.checks", "20"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

func writeUntilKilled(dir string) {
	l, err := Open(context.Background(), Options{Dir: dir, Kinds: testKinds, Clock: clock.System{}})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	c, err := testKinds.Parse("fs:ro:"+partition.String()+":/a", nil)
	if err != nil {
		os.Exit(1)
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				id := uuid.New()
				if try(l, requested(id, GrantRecord{Capability: c})) == nil {
					mu.Lock()
					fmt.Println(id)
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
}

// TestKilledWhileWriting kills a writer at any moment and wants everything it
// acknowledged back, on a whole chain.
func TestKilledWhileWriting(t *testing.T) {
	for round := range 5 {
		dir := t.TempDir()
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childDir+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var acknowledged []uuid.UUID
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			id, err := uuid.Parse(lines.Text())
			if err != nil {
				t.Fatalf("the child says %q", lines.Text())
			}
			if acknowledged = append(acknowledged, id); len(acknowledged) == 50+37*round {
				_ = cmd.Process.Kill()
			}
		}
		_ = cmd.Wait()
		l := open(t, dir, clock.System{})
		for _, id := range acknowledged {
			if got := stateOf(l, id); got != Pending {
				t.Fatalf("grant %s was acknowledged and is %q", id, got)
			}
		}
	}
}

func TestSecondOpener(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, clock.NewFake())
	_, err := Open(context.Background(), Options{Dir: dir, Kinds: testKinds, Clock: clock.NewFake()})
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("a second broker: %v, want it refused with the first one's pid", err)
	}
	put(t, l, requested(uuid.New(), GrantRecord{Capability: capability(t, "/a")}))
	// Reading beside it is fine.
	if r, err := Verify(context.Background(), dir); err != nil || r.Broken != nil || r.Events != 2 {
		t.Errorf("Verify beside a broker: %+v, %v", r, err)
	}
	for _, name := range []string{fileName, fileName + "-wal", lockName} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v; want mode 0600", name, info, err)
		}
	}
}

// TestGroupCommit has many writers at once: all that is acknowledged is there,
// in one order, in far fewer commits; one that fails drops only its own.
func TestGroupCommit(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	const writers, each = 64, 10
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	wake := l.Subscribe(ctx)
	errOdd := errors.New("odd")
	var wg sync.WaitGroup
	var mu sync.Mutex
	kept, seen := map[uuid.UUID]bool{}, map[uint64]bool{}
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				id := uuid.New()
				events, err := l.Update(context.Background(), func(tx *Tx) error {
					if err := tx.Append(requested(id, GrantRecord{Capability: capability(t, "/a")})); err != nil {
						return err
					}
					if _, ok := tx.State().Grant(id); !ok {
						t.Error("an Update does not see its own event")
					}
					if (w+i)%3 == 0 {
						return errOdd
					}
					return nil
				})
				if ((w+i)%3 == 0) != errors.Is(err, errOdd) {
					t.Errorf("got %v", err)
				}
				if err != nil {
					continue
				}
				mu.Lock()
				kept[id] = true
				if seen[events[0].Seq] {
					t.Errorf("two events are number %d", events[0].Seq)
				}
				seen[events[0].Seq] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	l.View(func(s *State) {
		if n := len(s.Grants(Filter{})); n != len(kept) {
			t.Errorf("%d grants, want %d", n, len(kept))
		}
		for id := range kept {
			if _, ok := s.Grant(id); !ok {
				t.Errorf("grant %s is lost", id)
			}
		}
	})
	select {
	case <-wake:
	default:
		t.Error("nobody was woken")
	}
}

func TestClosedLedgerRefuses(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := try(l, Event{Type: BrokerStopped, Actor: someone}); !errors.Is(err, ErrClosed) {
		t.Errorf("Update: %v", err)
	}
	if _, err := l.Events(0, EventFilter{}, 0); !errors.Is(err, ErrClosed) {
		t.Errorf("Events: %v", err)
	}
}

// TestPanicIsTheCallers wants a mistake in one Update to end that one alone.
func TestPanicIsTheCallers(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	func() {
		defer func() {
			if v := recover(); v != "mistake" {
				t.Errorf("recovered %v", v)
			}
		}()
		_, _ = l.Update(context.Background(), func(*Tx) error { panic("mistake") })
	}()
	put(t, l, Event{Type: BrokerStarted, Actor: someone})
}

func TestInvalidEvents(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	for name, e := range map[string]Event{
		"an unknown type":  {Type: "grant.stolen", Actor: someone},
		"no actor":         {Type: BrokerStopped},
		"no VM":            {Type: VMBound, Actor: someone},
		"no grant":         {Type: GrantActive, Actor: someone},
		"data not JSON":    {Type: BrokerStopped, Actor: someone, Data: []byte("{")},
		"a second birth":   {Type: LedgerCreated, Actor: someone, Data: JSON(CreatedData{Ledger: uuid.New(), Epoch: 2})},
		"a bare request":   {Type: GrantRequested, Actor: someone, Grant: uuid.New(), VM: holder},
		"data of no shape": {Type: NameSet, Actor: someone, Partition: partition, Data: []byte("7")},
	} {
		err := try(l, e)
		if !errors.Is(err, ErrInvalidEvent) && !errors.Is(err, ErrIllegalMove) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if seq, _ := l.Head(); seq != 1 {
		t.Errorf("the ledger has %d events, want only its birth", seq)
	}
}

// TestFullDisk fills the disk under a ledger: the answer is no, what was
// acknowledged stays, and with room again it goes on.
func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIP needs root to mount a small file system")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=512k,mode=0700"); err != nil {
		t.Skipf("SKIP needs to mount a tmpfs: %v", err)
	}
	defer func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) }()
	l, err := Open(context.Background(), Options{Dir: dir, Kinds: testKinds, Clock: clock.NewFake()})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	first := uuid.New()
	put(t, l, requested(first, GrantRecord{Capability: capability(t, "/a")}))
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 1<<20), 0o600); err == nil {
		t.Fatal("the disk is not full")
	}
	acknowledged := []uuid.UUID{first}
	var refused error
	for range 200 {
		id := uuid.New()
		err := try(l, requested(id, GrantRecord{Capability: capability(t, "/a"), Decision: []byte(`"` + strings.Repeat("x", 8192) + `"`)}))
		if err == nil {
			acknowledged = append(acknowledged, id)
			continue
		}
		refused = err
		if !errors.Is(err, ErrNotRecorded) && !errors.Is(err, ErrUnknownOutcome) && !errors.Is(err, ErrPoisoned) {
			t.Fatalf("refused with %v", err)
		}
	}
	if refused == nil {
		t.Fatal("a full disk refuses nothing")
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if l.Poisoned() != nil {
		if err := l.Reopen(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	for end := time.Now().Add(5 * time.Second); ; {
		err := try(l, requested(uuid.New(), GrantRecord{Capability: capability(t, "/a")}))
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("with room again: %v", err)
		}
	}
	for _, id := range acknowledged {
		if got := stateOf(l, id); got != Pending {
			t.Errorf("grant %s was acknowledged and is %q", id, got)
		}
	}
	if r, err := Verify(context.Background(), dir); err != nil || r.Broken != nil {
		t.Errorf("the chain: %v, %v", r.Broken, err)
	}
}

func BenchmarkCommit(b *testing.B) {
	l := open(b, b.TempDir(), clock.System{})
	for b.Loop() {
		put(b, l, Event{Type: BrokerStarted, Actor: someone})
	}
}

func BenchmarkCommit64Writers(b *testing.B) {
	l := open(b, b.TempDir(), clock.System{})
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := try(l, Event{Type: BrokerStarted, Actor: someone}); err != nil {
				b.Error(err)
			}
		}
	})
}
