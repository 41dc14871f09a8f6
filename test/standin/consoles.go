package main

import (
	"fmt"
	"os"
	"strings"

	"spectrum-os.org/broker/vmm"
)

// terminals are the pseudo-terminals behind the consoles; empty where there is
// none.
type terminals struct{ serial, console string }

// findTerminals asks QEMU which pseudo-terminals it opened.
func (g *guest) findTerminals() terminals {
	var t terminals
	if g.config.Serial.Mode != vmm.ConsolePty && g.config.Console.Mode != vmm.ConsolePty {
		return t
	}
	var list []struct{ Label, Filename string }
	if err := g.qmp.do("query-chardev", nil, nil, &list); err != nil {
		g.log.Warn("cannot find the consoles' terminals", "error", err)
		return t
	}
	for _, c := range list {
		name, ok := strings.CutPrefix(c.Filename, "pty:")
		switch {
		case !ok:
		case c.Label == "serial":
			t.serial = name
		case c.Label == "console":
			t.console = name
		}
	}
	return t
}

// name fills them in where vm.info shows them.
func (t terminals) name(cfg *vmm.VMConfig) {
	if t.serial != "" {
		cfg.Serial.File = t.serial
	}
	if t.console != "" {
		cfg.Console.File = t.console
	}
}

// addConsoles adds the serial port, which every guest has, and the virtio
// console where it leads somewhere.
func (g *guest) addConsoles(c *command) error {
	serial, err := chardev("serial", g.config.Serial)
	if err != nil {
		return err
	}
	c.add("-chardev", serial, "-device", "isa-serial,chardev=serial")
	switch g.config.Console.Mode {
	case "", vmm.ConsoleOff, vmm.ConsoleNull:
		return nil
	}
	console, err := chardev("console", g.config.Console)
	if err != nil {
		return err
	}
	d, err := g.devices.add("__console", "console", 0)
	if err != nil {
		return err
	}
	c.add("-chardev", console,
		"-device", fmt.Sprintf("virtio-serial-pci-non-transitional,id=%s,bus=%s,addr=0x%x", d.qid, segmentBus(0), d.slot),
		"-device", "virtconsole,chardev=console")
	return nil
}

// chardev writes the back end of a console.
func chardev(id string, cfg vmm.ConsoleConfig) (string, error) {
	mode := cfg.Mode
	if mode == "" {
		mode = vmm.ConsoleNull
	}
	switch mode {
	case vmm.ConsoleOff, vmm.ConsoleNull:
		return "null,id=" + id, nil
	case vmm.ConsoleFile:
		if cfg.File == "" {
			return "", errInvalid("Path missing when using file console mode")
		}
		return fmt.Sprintf("file,id=%s,path=%s", id, quote(cfg.File)), nil
	case vmm.ConsoleSocket:
		if cfg.Socket == "" {
			return "", errInvalid("Path missing when using socket console mode")
		}
		// Cloud Hypervisor replaces a socket that a dead VMM left.
		_ = os.Remove(cfg.Socket)
		return fmt.Sprintf("socket,id=%s,path=%s,server=on,wait=off", id, quote(cfg.Socket)), nil
	case vmm.ConsolePty:
		return "pty,id=" + id, nil
	case vmm.ConsoleTty:
		return "stdio,id=" + id + ",signal=off", nil
	}
	return "", errInvalid(fmt.Sprintf("unknown console mode %q", mode))
}
