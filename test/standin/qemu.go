package main

import (
	"fmt"
	"os"
	"strings"
)

// command is QEMU's command line with the files that it inherits.
type command struct {
	argv  []string
	files []*os.File
	owned []*os.File // opened here, closed by close
}

func (c *command) add(args ...string) { c.argv = append(c.argv, args...) }

// pass makes QEMU inherit the file and returns its number there.
func (c *command) pass(f *os.File) int {
	c.files = append(c.files, f)
	return 2 + len(c.files)
}

// open opens a file here, so that a path like /proc/self/fd/3 means our
// descriptor 3, and returns its number in QEMU.
func (c *command) open(path string, flag int) (int, error) {
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		return 0, err
	}
	c.owned = append(c.owned, f)
	return c.pass(f), nil
}

func (c *command) close() {
	for _, f := range c.owned {
		f.Close()
	}
}

func inherited(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// quote makes a value safe inside of one of QEMU's option lists.
func quote(v string) string { return strings.ReplaceAll(v, ",", ",,") }

func segmentBus(segment int) string { return fmt.Sprintf("seg%d", segment) }

// command writes the command line for the guest's configuration. The machine
// is QEMU's smallest with ACPI hotplug, which is what Cloud Hypervisor's
// guests see too; each PCI segment is a bridge with 31 slots.
func (g *guest) command(boot bootFiles) (*command, error) {
	cfg := g.config
	c := &command{}
	size := cfg.Memory.Size
	if size == 0 {
		size = 512 << 20
	}
	vcpus := max(cfg.Cpus.BootVCPUs, 1)
	c.add(g.host.qemu,
		"-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "pc,memory-backend=mem,usb=off,vmport=off,hpet=off,smbus=off,graphics=off",
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", fmt.Sprint(vcpus),
		"-m", fmt.Sprintf("%dB", size),
		"-object", fmt.Sprintf("memory-backend-memfd,id=mem,size=%dB,share=on", size),
		// A reset ends this QEMU, and the end of the guest leaves it standing
		// until its event was read.
		"-action", "reboot=shutdown,shutdown=pause,panic=shutdown", "-S",
	)
	for i := range g.devices.segments {
		c.add("-device", fmt.Sprintf("pci-bridge,id=%s,bus=pci.0,chassis_nr=%d,shpc=off,addr=0x%x", segmentBus(i), i+1, 0x10+i))
		// Firmware gives an empty bridge no window, and what is plugged in
		// later would find no space: something must be there from the start.
		c.add("-device", fmt.Sprintf("pci-testdev,bus=%s,addr=0x0", segmentBus(i)))
	}
	if err := g.addBase(c); err != nil {
		return c, err
	}
	if err := g.addConsoles(c); err != nil {
		return c, err
	}
	fd, err := c.open(boot.kernel, os.O_RDONLY)
	if err != nil {
		return c, internal("Cannot open kernel file", err.Error())
	}
	c.add("-kernel", inherited(fd), "-append", cfg.Payload.Cmdline)
	if boot.initramfs != "" {
		fd, err := c.open(boot.initramfs, os.O_RDONLY)
		if err != nil {
			return c, internal("Cannot open initramfs file", err.Error())
		}
		c.add("-initrd", inherited(fd))
	}
	if boot.incoming != nil {
		c.add("-incoming", fmt.Sprintf("fd:%d", c.pass(boot.incoming)))
	}
	return c, nil
}

// addBase adds the devices that are there from the start: the random number
// generator that every guest has, and the disks.
func (g *guest) addBase(c *command) error {
	rng, err := g.devices.add("__rng", "rng", 0)
	if err != nil {
		return err
	}
	c.add("-device", fmt.Sprintf("virtio-rng-pci-non-transitional,id=%s,bus=%s,addr=0x%x", rng.qid, segmentBus(0), rng.slot))
	for i, disk := range g.config.Disks {
		id := disk.ID
		if id == "" {
			id = fmt.Sprintf("_disk%d", i)
		}
		d, err := g.devices.add(id, "disk", disk.PCISegment)
		if err != nil {
			return err
		}
		flag, readOnly := os.O_RDWR, "off"
		if disk.ReadOnly {
			flag, readOnly = os.O_RDONLY, "on"
		}
		fd, err := c.open(disk.Path, flag)
		if err != nil {
			return internal("Error from device manager", "Failed to open disk path "+disk.Path, err.Error())
		}
		c.add("-add-fd", fmt.Sprintf("fd=%d,set=%d", fd, i+1),
			"-blockdev", fmt.Sprintf("driver=file,node-name=%s,filename=/dev/fdset/%d,read-only=%s,locking=off", d.backend, i+1, readOnly),
			"-device", fmt.Sprintf("virtio-blk-pci-non-transitional,id=%s,drive=%s,bus=%s,addr=0x%x", d.qid, d.backend, segmentBus(d.segment), d.slot))
	}
	return nil
}
