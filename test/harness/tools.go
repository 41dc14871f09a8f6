// Package harness makes a whole desktop in one directory: partitions, VM
// definitions, policies, a broker, and the means to look at all of it from
// outside. The demo, the e2e suite and the benchmarks are built on it.
//
// Its laws: everything it makes is beneath one directory; it ends only the
// processes it started, or that were started beneath that directory; and it
// can say what is left.
package harness

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Tools are the programs and images that a desktop is made of.
type Tools struct {
	VMM, Virtiofsd, Shim, Broker, Cap string
	Kernel, Initramfs                 string
	// Stretch multiplies every timeout.
	Stretch float64
}

// Register adds a flag for each.
func (t *Tools) Register(f *flag.FlagSet) {
	f.StringVar(&t.VMM, "vmm", "", "cloud-hypervisor, or a program that speaks its API")
	f.StringVar(&t.Virtiofsd, "virtiofsd", "virtiofsd", "the virtio-fs daemon")
	f.StringVar(&t.Shim, "shim", "spectrum-shim", "the shim")
	f.StringVar(&t.Broker, "broker", "spectrum-broker", "the broker")
	f.StringVar(&t.Cap, "cap", "spectrum-cap", "the command line")
	f.StringVar(&t.Kernel, "kernel", "", "the guests' kernel")
	f.StringVar(&t.Initramfs, "initramfs", "", "the guests' initramfs")
	f.Float64Var(&t.Stretch, "stretch", 1, "factor on every timeout")
}

// Missing names what the flags do not give, or give wrongly; nil if nothing.
func (t *Tools) Missing() error {
	for name, path := range map[string]*string{
		"-vmm": &t.VMM, "-virtiofsd": &t.Virtiofsd, "-shim": &t.Shim, "-broker": &t.Broker, "-cap": &t.Cap,
	} {
		found, err := exec.LookPath(*path)
		if err != nil {
			return fmt.Errorf("%s %q is not a program", name, *path)
		}
		if *path, err = filepath.Abs(found); err != nil {
			return err
		}
	}
	for name, path := range map[string]string{"-kernel": t.Kernel, "-initramfs": t.Initramfs} {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}
