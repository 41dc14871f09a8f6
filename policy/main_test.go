package policy

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// TestMain lets the test binary be the worker, and a probe of its sandbox.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "policy-worker":
			os.Exit(WorkerMain())
		case "sandbox-probe":
			os.Exit(probe())
		case "short-lived-broker":
			os.Exit(shortLivedBroker())
		}
	}
	os.Exit(m.Run())
}

func self(t testing.TB) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

// stretch gives tests room on a busy machine where they are not about time.
const stretch = 20

func testEngines(t testing.TB, change func(*Options)) *Engines {
	t.Helper()
	opts := Options{Worker: []string{self(t), "policy-worker"}, Stretch: stretch}
	if change != nil {
		change(&opts)
	}
	e := NewEngines(opts)
	t.Cleanup(e.Close)
	return e
}

var (
	partitionA = PartitionEngine(uuid.MustParse("aaaaaaaa-0000-4000-8000-000000000001"))
	partitionB = PartitionEngine(uuid.MustParse("bbbbbbbb-0000-4000-8000-000000000002"))
	holderVM   = uuid.MustParse("cccccccc-0000-4000-8000-000000000003")
)

const allowAll = "package spectrum.grant\n\nallow := true\n"

func testInput(path string) func(EngineID) Input {
	return func(EngineID) Input {
		uid := uint32(1000)
		return Input{
			Action: ActionGrant, Now: time.Date(2026, 3, 2, 10, 0, 0, 0, time.UTC),
			Requester: Requester{Kind: RequesterPerson, UID: &uid},
			Holder: Holder{
				VM: holderVM, Partition: &partitionA.Partition,
				Own: &Own{Names: []string{"editor"}, Labels: map[string]string{"app": "editor"}},
			},
			Capability: Capability{
				Kind:     "fs",
				Resource: json.RawMessage(fmt.Sprintf(`{"partition":%q,"path":%q}`, partitionA, path)),
				Rights:   []string{"read"},
			},
		}
	}
}

func load(t testing.TB, e *Engines, id EngineID, rego string) string {
	t.Helper()
	revision, err := e.Load(t.Context(), id, sources(rego))
	if err != nil {
		t.Fatal(err)
	}
	return revision
}

// shortLivedBroker prints the pid of a worker that is about to be busy for long,
// and waits to be killed.
func shortLivedBroker() int {
	exe, err := os.Executable()
	if err != nil {
		return 1
	}
	e := NewEngines(Options{Worker: []string{exe, "policy-worker"}, DecideTimeout: time.Hour, Stretch: 1})
	if _, err := e.Load(context.Background(), HostEngine, sources(timeBomb)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	go e.Decide(context.Background(), nil, testInput("/"), false)
	for e.Status()[0].Decisions == 0 {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(20 * time.Millisecond) // the request is on its way
	fmt.Println(e.Status()[0].PID)
	select {}
}

// probe confines itself as a worker does, then tries what a worker must not be
// able to do. It prints one line for each thing that worked.
func probe() int {
	inherited, err := os.Open("/") // as if the broker had leaked a descriptor
	if err != nil {
		fmt.Println("setup:", err)
		return 1
	}
	applied, err := confine(sandboxConfig{Parent: os.Getppid(), Namespaces: os.Getenv("PROBE_NS") == "1", Memory: 128 << 20})
	if err != nil {
		fmt.Println("confine:", err)
		return 1
	}
	fmt.Println("applied:", applied)
	worked := func(what string, err error) {
		if err == nil {
			fmt.Println("ESCAPE:", what)
		}
	}
	try := func() {
		_, err := os.ReadFile("/etc/passwd")
		worked("read /etc/passwd", err)
		_, err = unix.Openat(int(inherited.Fd()), "etc/passwd", unix.O_RDONLY, 0)
		worked("openat through a descriptor", err)
		_, err = os.ReadDir("/")
		worked("list /", err)
		worked("write a file", os.WriteFile("/tmp/probe", nil, 0o600))
		_, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		worked("inet socket", err)
		_, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		worked("unix socket", err)
		_, err = net.Dial("tcp", "127.0.0.1:1")
		worked("dial", err)
		worked("run a program", exec.Command("/bin/true").Run())
		worked("exec", syscall.Exec("/bin/true", []string{"true"}, nil))
		_, _, errno := unix.RawSyscall(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0)
		if errno == 0 {
			fmt.Println("ESCAPE: fork")
		}
		worked("signal the parent", unix.Kill(os.Getppid(), 0))
		worked("ptrace", unix.PtraceAttach(os.Getppid()))
		worked("become root", syscall.Setuid(0))
		_, err = unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_ANON|unix.MAP_PRIVATE)
		worked("map executable memory", err)
		worked("unshare", unix.Unshare(unix.CLONE_NEWUSER))
		worked("mount", unix.Mount("none", "/", "tmpfs", 0, ""))
		worked("raise a limit", unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1000, Max: 1000}))
		var fds []int
		for range 64 {
			if fd, err := unix.FcntlInt(0, unix.F_DUPFD, 0); err == nil {
				fds = append(fds, fd)
			}
		}
		if len(fds) >= maxWorkerFiles {
			fmt.Println("ESCAPE:", len(fds), "descriptors")
		}
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	}
	try()
	// Every thread is covered, not just the one that confined.
	done := make(chan struct{})
	for range 8 {
		go func() {
			try()
			done <- struct{}{}
		}()
	}
	for range 8 {
		<-done
	}
	fmt.Println("done")
	return 0
}
