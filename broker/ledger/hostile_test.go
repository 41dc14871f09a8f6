package ledger

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

func TestUnsafeDirectory(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(dir string) error
		want  error
	}{
		"others may write": {func(dir string) error { return os.Chmod(dir, 0o707) }, ErrUnsafeDir},
		"a group may":      {func(dir string) error { return os.Chmod(dir, 0o770) }, ErrUnsafeDir},
		"others may read":  {func(dir string) error { return os.Chmod(dir, 0o755) }, nil},
		"a lock that is a link": {func(dir string) error {
			return os.Symlink(filepath.Join(dir, "victim"), filepath.Join(dir, lockName))
		}, syscall.ELOOP},
		"a ledger that is a link": {func(dir string) error {
			return os.Symlink(filepath.Join(dir, "victim"), filepath.Join(dir, fileName))
		}, ErrNotLedger},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "state")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := c.spoil(dir); err != nil {
				t.Fatal(err)
			}
			l, err := Open(context.Background(), Options{Dir: dir, Kinds: testKinds, Clock: clock.NewFake()})
			if err == nil {
				_ = l.Close()
			}
			if !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
			if _, err := os.Lstat(filepath.Join(dir, "victim")); err == nil {
				t.Error("the link was followed")
			}
			if info, err := os.Stat(dir); c.want == nil && (err != nil || info.Mode().Perm() != 0o700) {
				t.Errorf("the directory is %v, %v; want mode 0700", info.Mode(), err)
			}
		})
	}
}

// TestWriterIsDurable asks the connection that writes, and not the one that
// was configured.
func TestWriterIsDurable(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	put(t, l, Event{Type: BrokerStarted, Actor: someone})
	for pragma, want := range map[string]string{"synchronous": "2", "journal_mode": "wal"} {
		var got string
		if err := l.store.writer.conn.QueryRowContext(context.Background(), "PRAGMA "+pragma).Scan(&got); err != nil || got != want {
			t.Errorf("%s is %q, %v; want %q", pragma, got, err, want)
		}
	}
	if err := l.Reopen(context.Background()); err != nil {
		t.Fatal(err)
	}
	put(t, l, Event{Type: BrokerStarted, Actor: someone})
	var got string
	if err := l.store.writer.conn.QueryRowContext(context.Background(), "PRAGMA synchronous").Scan(&got); err != nil || got != "2" {
		t.Errorf("after Reopen synchronous is %q, %v", got, err)
	}
}

// TestSlowReaders holds every reader's connection and wants a commit all the
// same: a revocation waits for nobody's audit.
func TestSlowReaders(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	put(t, l, Event{Type: BrokerStarted, Actor: someone})
	errEnough := errors.New("enough")
	release := make(chan struct{})
	var wg, held sync.WaitGroup
	for range maxReaders {
		held.Add(1)
		wg.Go(func() {
			err := l.store.each(context.Background(), 1, func(int64, []byte, []byte) error {
				held.Done()
				<-release
				return errEnough
			})
			if !errors.Is(err, errEnough) {
				t.Error(err)
			}
		})
	}
	held.Wait()
	done := make(chan error, 1)
	go func() { done <- try(l, Event{Type: BrokerStopped, Actor: someone}) }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the writer waits for readers")
	}
	close(release)
	wg.Wait()
}

// TestAllAtOnce is for the race detector, and wants every reader to see whole
// commits while the file is swapped under it.
func TestAllAtOnce(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	c := capability(t, "/a")
	stop := make(chan struct{})
	var readers, writers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				l.View(func(s *State) {
					if n := len(s.Grants(Filter{Holder: holder})); n%2 != 0 {
						t.Errorf("half an Update is visible: %d grants", n)
					}
					s.Due(capabilities.Instant{}, 0)
				})
				events, err := l.Events(0, EventFilter{}, 0)
				if err != nil {
					t.Errorf("Events: %v", err)
					return
				}
				for i, e := range events {
					if e.Seq != uint64(i+1) {
						t.Errorf("event %d is number %d", i+1, e.Seq)
						return
					}
				}
			}
		})
	}
	for range 4 {
		writers.Go(func() {
			for range 25 {
				pair := []Event{requested(uuid.New(), GrantRecord{Capability: c}), requested(uuid.New(), GrantRecord{Capability: c})}
				if err := try(l, pair...); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 5 {
		if err := l.Reopen(context.Background()); err != nil {
			t.Error(err)
		}
	}
	writers.Wait()
	close(stop)
	readers.Wait()
	if seq, _ := l.Head(); seq != 1+4*25*2 {
		t.Errorf("%d events", seq)
	}
}

// TestNoWakeUpIsLost follows the log by Subscribe alone.
func TestNoWakeUpIsLost(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	wake := l.Subscribe(ctx)
	const n = 100
	go func() {
		for range n {
			_ = try(l, Event{Type: BrokerStarted, Actor: someone})
		}
	}()
	for cursor := uint64(0); cursor < n+1; {
		events, err := l.Events(cursor, EventFilter{}, 7)
		if err != nil {
			t.Fatal(err)
		}
		if len(events) > 0 {
			cursor = events[len(events)-1].Seq
			continue
		}
		select {
		case <-wake:
		case <-ctx.Done():
			t.Fatalf("asleep at event %d of %d", cursor, n+1)
		}
	}
}

// TestFewerCommitsThanUpdates holds the writer until many wait for it.
func TestFewerCommitsThanUpdates(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	wake := l.Subscribe(t.Context())
	const n = 64
	started, release := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _ = l.Update(context.Background(), func(*Tx) error { close(started); <-release; return nil })
	})
	<-started
	for range n {
		wg.Go(func() {
			if err := try(l, Event{Type: BrokerStarted, Actor: someone}); err != nil {
				t.Error(err)
			}
		})
	}
	commits, done := 0, make(chan struct{})
	time.AfterFunc(200*time.Millisecond, func() { close(release) })
	go func() { wg.Wait(); close(done) }()
	for running := true; running; {
		select {
		case <-wake:
			commits++
		case <-done:
			running = false
		}
	}
	if seq, _ := l.Head(); seq != n+1 || commits == 0 || commits > n/2 {
		t.Errorf("%d events in %d commits", seq-1, commits)
	}
}

// TestLive asks about each way for a grant to be dead.
func TestLive(t *testing.T) {
	fake := clock.NewFake()
	l := open(t, t.TempDir(), fake)
	grant := func(parent uuid.UUID, ttl time.Duration) uuid.UUID {
		id := uuid.New()
		put(t, l, requested(id, GrantRecord{Capability: capability(t, "/a"), Parent: parent, Deadline: capabilities.NewDeadline(fake.Now(), ttl)}))
		return id
	}
	root := grant(uuid.Nil, 2*time.Hour)
	middle := grant(root, time.Hour)
	leaf := grant(middle, time.Hour)
	failed := grant(root, time.Hour)
	put(t, l, NewChange(GrantFailed, someone, failed, Change{}))
	want := func(id, cause uuid.UUID, why error) {
		t.Helper()
		err := live(l, id, fake.Now())
		dead, _ := errors.AsType[*DeadError](err)
		if !errors.Is(err, why) || (why != nil && (dead == nil || dead.Cause != cause || dead.Grant != id)) {
			t.Errorf("got %v, want %v by %s", err, why, cause)
		}
	}
	stranger := uuid.New()
	want(leaf, uuid.Nil, nil)
	want(stranger, stranger, ErrUnknownGrant)
	want(failed, failed, ErrFailed)
	fake.Advance(time.Hour)
	want(leaf, leaf, ErrExpired)
	want(root, uuid.Nil, nil)
	put(t, l, NewChange(GrantRevoking, someone, middle, Change{}))
	want(middle, middle, ErrRevoked)
	put(t, l, NewChange(GrantRevoked, someone, middle, Change{}))
	want(middle, middle, ErrRevoked)
}

// TestChildOutlivesByEitherClock gives a child one clock more than its parent.
func TestChildOutlivesByEitherClock(t *testing.T) {
	fake := clock.NewFake()
	l := open(t, t.TempDir(), fake)
	parent, end := uuid.New(), capabilities.NewDeadline(fake.Now(), time.Hour)
	put(t, l, requested(parent, GrantRecord{Capability: capability(t, "/a"), Deadline: end}))
	for name, change := range map[string]func(d *capabilities.Deadline){
		"wall":         func(d *capabilities.Deadline) { d.Wall = d.Wall.Add(1) },
		"boot":         func(d *capabilities.Deadline) { d.Boot++ },
		"another boot": func(d *capabilities.Deadline) { d.BootID = uuid.NewString() },
		"no boot":      func(d *capabilities.Deadline) { d.BootID, d.Boot = "", 0 },
	} {
		d := end
		change(&d)
		if err := try(l, requested(uuid.New(), GrantRecord{Capability: capability(t, "/a"), Parent: parent, Deadline: d})); !errors.Is(err, ErrNotCovered) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// decodeGrantRecord reads the Data of a grant.requested event.
func decodeGrantRecord(kinds *capabilities.Kinds, data json.RawMessage) (GrantRecord, error) {
	var v requestJSON
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		return GrantRecord{}, fmt.Errorf("%w: %w", ErrInvalidEvent, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return GrantRecord{}, fmt.Errorf("%w: more than one value", ErrInvalidEvent)
	}
	c, err := kinds.DecodeJSON(v.Capability)
	if err != nil {
		return GrantRecord{}, fmt.Errorf("%w: %w", ErrInvalidEvent, err)
	}
	g := GrantRecord{
		Instance: v.Instance, Parent: v.Parent, Capability: c, Label: v.Label,
		Limits: v.Limits, Persist: v.Persist, Declared: v.Declared, Decision: v.Decision,
	}
	if v.Deadline != nil {
		g.Deadline = *v.Deadline
	}
	return g, nil
}

// TestDataRoundTrip wants every member of a grant back from the audit.
func TestDataRoundTrip(t *testing.T) {
	fake := clock.NewFake()
	l := open(t, t.TempDir(), fake)
	depth, uses := 3, 0
	parent, id := uuid.New(), uuid.New()
	put(t, l, requested(parent, GrantRecord{Capability: capability(t, "/")}))
	in := GrantRecord{
		Instance: "i", Parent: parent, Capability: capability(t, "/ä <&>"), Label: "läbel",
		Deadline: capabilities.NewDeadline(fake.Now(), time.Hour), Limits: Limits{&depth, &uses},
		Persist: true, Declared: true, Decision: []byte(`{ "outcome" : "allow" }`),
	}
	put(t, l, requested(id, in))
	events, err := l.Events(0, EventFilter{Grant: id}, 0)
	if err != nil || len(events) != 1 {
		t.Fatal(events, err)
	}
	out, err := decodeGrantRecord(testKinds, events[0].Data)
	if err != nil {
		t.Fatal(err)
	}
	in.Decision = []byte(`{"outcome":"allow"}`)
	if got, want := text(t, out), text(t, in); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if _, err := decodeGrantRecord(testKinds, append(bytes.Clone(events[0].Data), '1')); !errors.Is(err, ErrInvalidEvent) {
		t.Errorf("two values: %v", err)
	}
	in.Label = "\xff"
	if err := try(l, requested(uuid.New(), in)); !errors.Is(err, ErrInvalidEvent) {
		t.Errorf("a label that is not UTF-8: %v", err)
	}
	in.Label, in.Decision = "", []byte(`"`+strings.Repeat("x", maxRecord)+`"`)
	if err := try(l, requested(uuid.New(), in)); !errors.Is(err, ErrInvalidEvent) {
		t.Errorf("a record that is too long: %v", err)
	}
}

func text(t *testing.T, g GrantRecord) string {
	t.Helper()
	r, err := newRequest(&g)
	if err != nil {
		t.Fatal(err)
	}
	data, err := r.json()
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestForgedContent re-makes the whole chain, as who can write the file can,
// and wants nonsense refused all the same, without a panic.
func TestForgedContent(t *testing.T) {
	for name, e := range map[string]entry{
		"data that is not JSON":      {Event: Event{Type: PolicyLoaded}, dataKind: dataJSON, data: []byte("{")},
		"a decision that is not":     {Event: Event{Type: GrantRequested, Grant: holder, VM: holder}, dataKind: dataRequest, data: encodeRequest(nil, &request{capability: []byte("{}"), decision: []byte("{")})},
		"a capability that is not":   {Event: Event{Type: GrantRequested, Grant: holder, VM: holder}, dataKind: dataRequest, data: encodeRequest(nil, &request{capability: []byte("{")})},
		"a boot time beyond time":    {Event: Event{Type: GrantRequested, Grant: holder, VM: holder}, dataKind: dataRequest, data: encodeRequest(nil, &request{capability: []byte("{}"), hasDeadline: true, boot: 1 << 63})},
		"a degraded grant of nobody": {Event: Event{Type: GrantDegraded, Grant: holder}},
	} {
		t.Run(name, func(t *testing.T) {
			dir, head := written(t)
			e.Seq, e.Prev, e.Actor = 6, head, someone
			body := encodeEvent(nil, &e.Event, e.dataKind, e.data)
			hash := hashRecord(body)
			spoil(t, dir, "INSERT INTO events VALUES (6, ?, ?)", body, hash[:])
			if r, err := Verify(context.Background(), dir); err != nil || r.Broken == nil || r.Broken.Seq != 6 || r.Broken.Problem != BrokenIllegal {
				t.Errorf("Verify: %v, %v", r.Broken, err)
			}
		})
	}
}

// TestFileWithMore hides things where the chain does not look.
func TestFileWithMore(t *testing.T) {
	dir, _ := written(t)
	body, hash := row(t, dir, 3)
	spoil(t, dir, "INSERT INTO events VALUES (-7, ?, ?)", body, hash)
	if r, err := Verify(context.Background(), dir); err != nil || r.Broken == nil || r.Broken.Problem != BrokenGap {
		t.Errorf("a row before the first: %v, %v", r.Broken, err)
	}
	dir, _ = written(t)
	spoil(t, dir, "CREATE TRIGGER t AFTER INSERT ON events BEGIN DELETE FROM events WHERE seq = NEW.seq; END")
	if _, err := Verify(context.Background(), dir); !errors.Is(err, ErrNotLedger) {
		t.Errorf("a trigger: %v", err)
	}
}

// TestVerifyElsewhere wants a copy to verify, and a reader who gives up to be
// told so and not that the chain is broken.
func TestVerifyElsewhere(t *testing.T) {
	l := open(t, t.TempDir(), clock.NewFake())
	put(t, l, Event{Type: BrokerStarted, Actor: someone})
	copied := t.TempDir()
	for _, suffix := range []string{"", "-wal"} {
		raw, err := os.ReadFile(filepath.Join(l.o.Dir, fileName+suffix))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(copied, fileName+suffix), raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := Verify(context.Background(), copied); err != nil || r.Broken != nil || r.Events != 2 {
		t.Errorf("a copy with its log: %+v, %v", r, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if r, err := Verify(ctx, copied); !errors.Is(err, context.Canceled) || r.Broken != nil {
		t.Errorf("given up: %v, %v", r.Broken, err)
	}
	ro, err := Open(context.Background(), Options{Dir: l.o.Dir, Kinds: testKinds, Clock: clock.NewFake(), ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	if err := try(ro, Event{Type: BrokerStarted, Actor: someone}); !errors.Is(err, ErrReadOnly) {
		t.Errorf("Update: %v", err)
	}
	if err := ro.Reopen(context.Background()); !errors.Is(err, ErrReadOnly) {
		t.Errorf("Reopen: %v", err)
	}
}

// TestInternerIsBounded interns far more than it may remember.
func TestInternerIsBounded(t *testing.T) {
	in := newInterner()
	for i := range 3 * maxInterned {
		in.string(fmt.Appendf(nil, "%d %s", i, strings.Repeat("x", 1000)))
		in.shared(about{instance: fmt.Sprint(i)})
		in.capability(&request{capability: fmt.Append(nil, i)})
	}
	if in.strings.bytes > maxInternedBytes+2000 || len(in.strings.known) > maxInterned || len(in.about) > maxInterned || len(in.capabilities) > maxInterned {
		t.Errorf("%d bytes in %d strings, %d grants, %d capabilities", in.strings.bytes, len(in.strings.known), len(in.about), len(in.capabilities))
	}
}
