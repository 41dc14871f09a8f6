package shim

import (
	"context"
	"errors"
	"testing"
	"time"

	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

// extension moves an object's deadline to so long from now.
func (v *vm) extension(id string, generation uint64, ttl time.Duration) Extension {
	return Extension{
		ID: id, Generation: generation, Instance: v.state().Instance,
		Deadline: capabilities.NewDeadline(clock.System{}.Now(), ttl),
	}
}

// TestExtend wants an object to live to its second deadline, served by the same
// process all along, and to end there without anybody's help.
func TestExtend(t *testing.T) {
	v := startVM(t, "")
	o := v.object("a")
	o.Deadline = capabilities.NewDeadline(clock.System{}.Now(), 2*time.Second)
	first := v.put(o, t.TempDir())
	begun := time.Now()
	e := v.extension("a", 2, 4*time.Second)
	for range 2 { // it is idempotent
		st, err := v.Extend(ctxFor(t, 10*time.Second), e)
		if err != nil || st.Generation != 2 || !st.Deadline.Equal(e.Deadline) || len(st.PIDs) != 1 || st.PIDs[0] != first.PIDs[0] {
			t.Fatalf("%+v, %v", st, err)
		}
	}
	p, err := first.PIDs[0].open()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := waitPidfd(p); err != nil {
		t.Fatal(err)
	}
	if lived := time.Since(begun); lived < 3900*time.Millisecond {
		t.Errorf("an object that was extended to 4s lived %v", lived)
	}
}

// TestExtendIsChecked wants nothing but a newer deadline of what is there.
func TestExtendIsChecked(t *testing.T) {
	v := startVM(t, "")
	dir := t.TempDir()
	o := v.object("a")
	o.Generation, o.Deadline = 5, capabilities.NewDeadline(clock.System{}.Now(), time.Hour)
	v.put(o, dir)
	ctx := ctxFor(t, 30*time.Second)
	refused := func(what string, e Extension, code string) {
		t.Helper()
		if _, err := v.Extend(ctx, e); !errors.Is(err, &Error{Code: code}) {
			t.Errorf("%s: %v, want %s", what, err, code)
		}
		for _, seen := range v.state().Objects {
			if seen.ID == "a" && (seen.Generation != 5 || !seen.Deadline.Equal(o.Deadline)) {
				t.Fatalf("%s: it is %+v now", what, seen)
			}
		}
	}
	refused("an older generation that arrives late", v.extension("a", 4, 2*time.Hour), CodeStaleGeneration)
	refused("another deadline of the same generation", v.extension("a", 5, 2*time.Hour), CodeStaleGeneration)
	refused("a deadline that has passed", v.extension("a", 6, 0), CodeExpired)
	refused("an object that is not there", v.extension("b", 6, time.Hour), CodeRemoved)
	other := v.extension("a", 6, time.Hour)
	other.Instance = "another"
	refused("another run's", other, CodeWrongInstance)
	v.remove("a", 6)
	refused("what was removed, by a newer generation", v.extension("a", 7, time.Hour), CodeRemoved)
	// Nor does an extension that comes first let an older removal lose.
	v.put(v.object("c"), dir)
	if _, err := v.Extend(ctx, v.extension("c", 2, time.Hour)); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Remove(ctx, "c", 1); !errors.Is(err, &Error{Code: CodeStaleGeneration}) {
		t.Errorf("an older removal: %v", err)
	}
	v.remove("c", 3)
}

// TestExtendRacesTheDeadline extends objects at the moment at which they end:
// each lives on, or was refused and is gone; none is in between.
func TestExtendRacesTheDeadline(t *testing.T) {
	v := startVM(t, "")
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	lived, ended := 0, 0
	for i := range 8 {
		o := v.object("r" + string(rune('a'+i)))
		// Long enough for a busy machine to have made it by then.
		o.Deadline = capabilities.NewDeadline(clock.System{}.Now(), 2*time.Second)
		st := v.put(o, dir)
		time.Sleep(time.Until(o.Deadline.Wall) + time.Duration(i-4)*2*time.Millisecond)
		_, err := v.Extend(ctx, v.extension(o.ID, 2, time.Hour))
		switch {
		case err == nil:
			lived++
			time.Sleep(50 * time.Millisecond)
			if !alive(st.PIDs[0]) {
				t.Errorf("round %d: it was extended, and is gone", i)
			}
			v.remove(o.ID, 3)
		case errors.Is(err, &Error{Code: CodeRemoved}):
			ended++
			waitDead(t, st.PIDs[0])
		default:
			t.Errorf("round %d: %v", i, err)
		}
	}
	t.Logf("%d were extended, %d had ended", lived, ended)
}
