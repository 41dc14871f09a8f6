package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/policy"
	"spectrum-os.org/broker/vmm/shim"
)

// TestMain makes this program the policy worker too, and the shim and what it
// starts.
func TestMain(m *testing.M) {
	switch {
	case len(os.Args) == 1 || strings.HasPrefix(os.Args[1], "-test."):
		os.Exit(m.Run())
	case os.Args[1] == workerArgument:
		os.Exit(policy.WorkerMain())
	}
	os.Exit(shim.Main())
}

// TestImpossibleValues: each is refused before anything is touched, with the
// flag, what was given and what is allowed.
func TestImpossibleValues(t *testing.T) {
	for args, want := range map[string]string{
		"--cut-deadline=-5s":     "--cut-deadline -5s is not between 1ms and 24h",
		"--cut-deadline=0":       "--cut-deadline 0s is not between 1ms and 24h",
		"--cut-deadline=9000h":   "--cut-deadline 9000h0m0s is not between 1ms and 24h",
		"--stop-grace=-1ns":      "--stop-grace -1ns is not between 1ms and 24h",
		"--boot-grace=-30s":      "--boot-grace -30s is not between 1ms and 24h",
		"--pci-segments=99":      "--pci-segments 99 is not between 1 and 8",
		"--pci-segments=9":       "--pci-segments 9 is not between 1 and 8",
		"--pci-segments=0":       "--pci-segments 0 is not between 1 and 8",
		"--pci-segments=-1":      "--pci-segments -1 is not between 1 and 8",
		"--max-grants=-1":        "--max-grants -1 is not between 1 and 1000000",
		"--guest-requests=0":     "--guest-requests 0 is not between 1 and 1000000",
		"--rotate-audit-at=9":    "--rotate-audit-at 9 is neither 0 nor between 1000 and 1000000000",
		"--rotate-audit-at=-1":   "--rotate-audit-at -1 is neither 0 nor between 1000 and 1000000000",
		"--guest-burst=-9":       "--guest-burst -9 is not between 1 and 1000000",
		"--stretch=0.5":          "--stretch 0.5 is not between 1 and 1000",
		"--stretch=NaN":          "--stretch NaN is not between 1 and 1000",
		"--stretch=+Inf":         "--stretch +Inf is not between 1 and 1000",
		"--socket-mode=rw":       `--socket-mode "rw" is not an octal mode between 0 and 0777`,
		"--socket-mode=1777":     `--socket-mode "1777" is not an octal mode between 0 and 0777`,
		"--socket-mode=0":        `--socket-mode "0" lets nobody in`,
		"--log-level=loud":       `--log-level "loud" is none of debug, info, warn and error`,
		"--log-level=info+3":     `--log-level "info+3" is none of debug, info, warn and error`,
		"--state=":               "--state is empty",
		"--runtime=":             "--runtime is empty",
		"--vmm=":                 "--vmm is empty",
		"--cut-deadline=soon":    `invalid argument "soon" for "--cut-deadline"`,
		"--pci-segments=several": `invalid argument "several" for "--pci-segments"`,
		"--nonsense":             "unknown flag: --nonsense",
		"run":                    `it takes flags only, not "run"`,
	} {
		var out, errs strings.Builder
		code := start(t.Context(), []string{args, "--shim=/nonexistent"}, &out, &errs)
		if code != exitUsage || !strings.HasPrefix(errs.String(), "spectrum-broker: "+want) || out.Len() > 0 {
			t.Errorf("%s: code %d, stdout %q, stderr %q; want %q", args, code, out.String(), errs.String(), want)
		}
		if !strings.HasSuffix(errs.String(), "See 'spectrum-broker --help'.\n") {
			t.Errorf("%s: stderr %q", args, errs.String())
		}
	}
}

// TestPossibleValues get as far as the program that is missing.
func TestPossibleValues(t *testing.T) {
	for _, args := range []string{
		"--pci-segments=8", "--pci-segments=1", "--cut-deadline=1ms", "--stop-grace=24h", "--stretch=2.5",
		"--socket-mode=0660", "--log-level=debug", "--max-grants=1", "--partitions=", "--builtin=",
	} {
		var out, errs strings.Builder
		code := start(t.Context(), []string{args, "--shim=/nonexistent", "--vmm=/bin/sh", "--virtiofsd=/bin/sh"}, &out, &errs)
		if want := "spectrum-broker: --shim: cannot find the program \"/nonexistent\"\n"; code != exitFailed || errs.String() != want {
			t.Errorf("%s: code %d, %q, want %q", args, code, errs.String(), want)
		}
	}
}

// TestSegmentsAreTheShims: what is allowed here is what a shim takes.
func TestSegmentsAreTheShims(t *testing.T) {
	for segments, want := range map[int]string{
		maxSegments:     "the opened boot files are not those of the spec",
		maxSegments + 1: "PCI segments are more than",
	} {
		_, err := shim.Start(t.Context(), shim.StartOptions{Spec: shim.Spec{
			VM: uuid.New(), RuntimeDir: t.TempDir(), VMM: "/bin/sh", Virtiofsd: "/bin/sh", MemoryMiB: 64, VCPUs: 1, Segments: segments,
		}})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%d segments: %v, want %q", segments, err, want)
		}
	}
}

func TestHelpAndVersion(t *testing.T) {
	var out, errs strings.Builder
	if code := start(t.Context(), []string{"--help"}, &out, &errs); code != 0 || !strings.Contains(out.String(), exitCodeText) {
		t.Errorf("code %d, %s", code, out.String())
	}
	for _, want := range []string{"(default 2s)", "(default 10s)", "(default 30s)", "(default 5)", "(default 256)", "(default 12)", "(default 120)"} {
		if strings.Count(out.String(), want) != 1 {
			t.Errorf("the help says %q not once:\n%s", want, out.String())
		}
	}
	out.Reset()
	if code := start(t.Context(), []string{"--version"}, &out, &errs); code != 0 || !strings.HasPrefix(out.String(), "spectrum-broker version ") {
		t.Errorf("code %d, %s", code, out.String())
	}
	if errs.Len() > 0 {
		t.Errorf("stderr %q", errs.String())
	}
}

// world is a directory for one broker, and the arguments of one that lives in
// it and whose VMM is none.
func world(t *testing.T) (dir string, args []string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "broker") // short: sockets live in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "policy", "host.rego"), "package spectrum.grant\n")
	return dir, []string{
		"--state", filepath.Join(dir, "state"), "--runtime", filepath.Join(dir, "run"), "--partitions", filepath.Join(dir, "partitions"),
		"--host-policy", filepath.Join(dir, "policy"), "--vmm", "/bin/true", "--virtiofsd", "/bin/true", "--shim", self, "--stretch", "10",
	}
}

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestNoPartitions: the first thing that goes wrong on a new machine.
func TestNoPartitions(t *testing.T) {
	dir, args := world(t)
	partitions := filepath.Join(dir, "partitions")
	for _, prepare := range []func(){func() {}, func() { write(t, partitions, "a file") }} {
		prepare()
		var out, errs strings.Builder
		code := start(t.Context(), args, &out, &errs)
		want := "spectrum-broker: cannot start: there is no directory " + partitions + " (--partitions); it is to hold one directory for each mounted user partition, named by its UUID, and may be empty\n"
		if code != exitFailed || errs.String() != want {
			t.Errorf("code %d, %q; want %q", code, errs.String(), want)
		}
	}
}

// TestNoVMM starts a VM with a program that is none, which succeeds at once
// and says nothing.
func TestNoVMM(t *testing.T) {
	dir, args := world(t)
	partition := uuid.NewString()
	definition := filepath.Join(dir, "partitions", partition, "svc/data/app")
	write(t, filepath.Join(definition, "vmlinux"), "no kernel")
	write(t, filepath.Join(dir, "partitions", partition, "files/x"), "")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan int, 1)
	var out, errs strings.Builder
	go func() { ended <- start(ctx, args, &out, &errs) }()
	client := api.NewClient(filepath.Join(dir, "run", "host.sock"))
	defer client.Close()
	var err error
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if _, err = client.StartVM(t.Context(), "app"); !errors.Is(err, api.ErrUnreachable) {
			break
		}
	}
	want := "cannot start " + partition[:8] + "/app: the guest shut down; it never ran: see whether /bin/true (--vmm) starts by itself, and whether " +
		filepath.Join(definition, "vmlinux") + " is a kernel that it boots"
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	cancel()
	if code := <-ended; code != 0 {
		t.Errorf("code %d, %s", code, errs.String())
	}
}
