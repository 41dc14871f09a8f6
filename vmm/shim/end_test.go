package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"spectrum-os.org/broker/clock"
)

func TestEndOfVM(t *testing.T) {
	for word, reason := range map[string]string{
		"shutdown": "the guest shut down",
		"crash":    "the VMM ended: exit status 7: something broke",
	} {
		t.Run(word, func(t *testing.T) {
			v := startVM(t, "")
			st := v.put(v.object("a"), t.TempDir())
			s := v.state()
			v.say(word)
			ctx := ctxFor(t, 10*time.Second)
			for s.Phase != Stopped {
				var err error
				if s, err = v.Watch(ctx, s.Seq); err != nil {
					t.Fatal(err)
				}
			}
			if s.ExitReason != reason || alive(st.PIDs[0]) {
				t.Errorf("state: %+v", s)
			}
			v.wantExit()
		})
	}
}

// An object that the VMM was not yet told of ends with its VM because the VM
// ended, and not because somebody removed it: a grant that persists waits for
// the next run, and does not fail.
func TestEndOfVMOvertakesPuts(t *testing.T) {
	v := startVM(t, "slow-add")
	dir := t.TempDir()
	puts := make(chan error, 3)
	for i := range 3 {
		o := v.object(fmt.Sprintf("p%d", i))
		go func() {
			_, err := v.Put(context.WithoutCancel(t.Context()), o, openPath(t, dir))
			puts <- err
		}()
		for len(v.state().Objects) < i+1 || len(v.state().Objects[i].PIDs) == 0 {
			time.Sleep(5 * time.Millisecond)
		}
	}
	// The VMM is busy for a second with the first, and the others wait for it.
	stopped := make(chan error, 1)
	go func() { stopped <- v.Stop(ctxFor(t, 10*time.Second), 0) }()
	for range 3 {
		err := <-puts
		if errors.Is(err, ErrNoShim) {
			continue // the shim has ended as well by then
		}
		wantCode(t, err, CodeNotRunning)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	v.wantExit()
}

func (v *vm) wantExit() {
	v.t.Helper()
	select {
	case <-v.Exited():
	case <-time.After(10 * time.Second):
		v.t.Fatal("the shim does not exit")
	}
	if _, err := os.Stat(v.spec.RuntimeDir); !errors.Is(err, os.ErrNotExist) {
		v.t.Errorf("the runtime directory is left: %v", err)
	}
	if own, err := ownCgroup(); err == nil {
		if _, err := os.Stat(filepath.Join(own, "spectrum-vm-"+v.spec.VM.String())); err == nil {
			v.t.Error("the cgroup is left")
		}
	}
}

func TestStop(t *testing.T) {
	for cmdline, grace := range map[string]time.Duration{"": 5 * time.Second, "hold": 200 * time.Millisecond} {
		v := startVM(t, cmdline)
		st := v.put(v.object("a"), t.TempDir())
		if err := v.Stop(ctxFor(t, 4*time.Second), grace); err != nil {
			t.Fatal(err)
		}
		if alive(st.PIDs[0]) {
			t.Error("virtiofsd outlived the VM")
		}
		v.wantExit()
	}
}

func TestKilledShimTakesAllAlong(t *testing.T) {
	v := startVM(t, "hold")
	v.put(v.object("a"), t.TempDir())
	v.put(v.object("b"), t.TempDir())
	procs := v.procs()
	if len(procs) != 3 {
		t.Fatalf("recorded: %v", procs)
	}
	if err := syscall.Kill(v.Proc().PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitDead(t, procs...)
	<-v.Exited()
	if _, err := Dial(v.spec.RuntimeDir); err == nil {
		t.Error("a dead shim was adopted")
	}
	if err := Reap(v.spec.RuntimeDir); err != nil {
		t.Fatal(err)
	}
	v.wantExit()
}

func TestReapKillsALivingShim(t *testing.T) {
	v := startVM(t, "")
	v.put(v.object("a"), t.TempDir())
	procs := v.procs()
	if err := Reap(v.spec.RuntimeDir); err != nil {
		t.Fatal(err)
	}
	waitDead(t, append(procs, v.Proc())...)
	if err := Reap(v.spec.RuntimeDir); err != nil {
		t.Errorf("nothing to reap: %v", err)
	}
}

// A number that another process has now is left alone.
func TestReapSparesOthers(t *testing.T) {
	dir := t.TempDir()
	bystander := exec.Command("sleep", "60")
	if err := bystander.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = bystander.Process.Kill(); _ = bystander.Wait() }()
	id, _ := clock.BootID()
	start, err := startTime(bystander.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range []Proc{
		{PID: bystander.Process.Pid, Start: start + 1, BootID: id},
		{PID: bystander.Process.Pid, Start: start, BootID: "another boot"},
	} {
		sub := filepath.Join(dir, fmt.Sprint(i))
		if err := os.Mkdir(sub, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := writeJSON(sub, recordsName, records{Procs: []Proc{p}}); err != nil {
			t.Fatal(err)
		}
		if err := Reap(sub); err != nil {
			t.Fatal(err)
		}
	}
	id2 := Proc{PID: bystander.Process.Pid, Start: start, BootID: id}
	if !alive(id2) {
		t.Fatal("a bystander was killed")
	}
}

func TestAdopt(t *testing.T) {
	v := startVM(t, "")
	v.put(v.object("a"), t.TempDir())
	second, err := Dial(v.spec.RuntimeDir)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	s, err := second.State(t.Context())
	if err != nil || len(s.Objects) != 1 || s.VM != v.spec.VM {
		t.Fatalf("%+v, %v", s, err)
	}
	// An impostor on the socket is not believed.
	ident := v.Proc()
	ident.Start++
	if err := writeJSON(v.spec.RuntimeDir, identName, ident); err != nil {
		t.Fatal(err)
	}
	if _, err := Dial(v.spec.RuntimeDir); !errors.Is(err, errOtherProcess) {
		t.Errorf("dial with a wrong start time: %v", err)
	}
	if err := writeJSON(v.spec.RuntimeDir, identName, v.Proc()); err != nil {
		t.Fatal(err)
	}
}
