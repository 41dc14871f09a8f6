package disks

import (
	"flag"
	"math/rand/v2"
	"os"
	"testing"

	"spectrum-os.org/broker/test/harness"
	"spectrum-os.org/broker/vmm/vmmtest"
)

var (
	tools harness.Tools
	cuts  int
	seed  uint64
)

// TestMain lets the test binary be the VMM.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "--api-socket" {
		os.Exit(vmmtest.Main(os.Args[1:]))
	}
	tools.Register(flag.CommandLine)
	flag.IntVar(&cuts, "cuts", 30, "how often the power is cut")
	flag.Uint64Var(&seed, "seed", 0, "seed of the power cuts; 0: a new one")
	flag.Parse()
	if seed == 0 {
		seed = rand.Uint64N(1_000_000) + 1
	}
	os.Exit(m.Run())
}

// needTools skips, loudly, where there is nothing to test or to test it with.
func needTools(t *testing.T) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The VMM's "kernel" is only ever read, and no command line is used.
	tools.VMM, tools.Kernel, tools.Initramfs, tools.Cap = self, self, self, self
	if err := tools.Missing(); err != nil {
		t.Skipf("SKIP: NO BAD DISK and NO POWER CUT is tested: it takes the programs under test (test/README.md): %v", err)
	}
	if _, err := os.Stat("/dev/fuse"); err != nil || os.Getuid() != 0 {
		t.Skipf("SKIP: NO BAD DISK and NO POWER CUT is tested: it takes root and FUSE: uid %d, %v", os.Getuid(), err)
	}
}

// choices is the random source of a seed.
func choices(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 1)) } //nolint:gosec // to be replayed
