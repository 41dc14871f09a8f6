package main

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/test/guest/execclient"
	"spectrum-os.org/broker/test/harness"
)

// workPolicy is what the owner of the partition "work" wrote.
const workPolicy = `package spectrum.grant

# The VM labelled "reader" may read what is in /reports.
allow if {
	input.capability.kind == "fs"
	input.capability.resource.partition == input.partition
	startswith(input.capability.resource.path, "/reports")
	input.capability.rights == ["read"]
	input.holder.own.labels.job == "reader"
}

deny contains "nobody reads the payroll" if {
	startswith(input.capability.resource.path, "/payroll")
}
`

// homePolicy is what the owner of the partition "home" wrote.
const homePolicy = `package spectrum.grant

allow if input.holder.partition == input.partition
`

const hostPolicy = `package spectrum.grant

allow if input.requester.kind == "person"
`

// cast is who plays.
type cast struct {
	work, home     harness.Partition
	reader, viewer uuid.UUID
	readerGuest    *execclient.Client
	viewerGuest    *execclient.Client
	grant          api.Grant
}

func (s *story) tell() error {
	var c cast
	for _, act := range []func(*cast) error{s.setTheStage, s.refused, s.granted, s.foreignToken, s.revokedUnderUse, s.onRecord} {
		if err := act(&c); err != nil {
			return err
		}
	}
	fmt.Fprintln(s.out, "\nEverything was as announced.")
	return nil
}

func (s *story) setTheStage(c *cast) error {
	fmt.Fprintf(s.out, "The VMM is %s.\n\n", s.vmm())
	return errorsIn(
		func() error {
			return s.step(`two user partitions, "work" and "home", each with files, a VM and a Rego policy`, func() (string, error) {
				return s.makePartitions(c)
			})
		},
		func() error {
			return s.step("the broker starts, and the partitions get their names", func() (string, error) {
				ctx, cancel := context.WithTimeout(s.ctx, s.d.Stretched(30*time.Second))
				defer cancel()
				if err := s.d.StartBroker(ctx); err != nil {
					return "", err
				}
				one, err := s.cli(0, "name", "set", "work", c.work.ID.String())
				if err != nil {
					return "", err
				}
				two, err := s.cli(0, "name", "set", "home", c.home.ID.String())
				return one + "\n" + two, err
			})
		},
		func() error {
			return s.step("a VM of each boots, with nothing", func() (string, error) { return s.boot(c) })
		},
	)
}

func errorsIn(steps ...func() error) error {
	for _, s := range steps {
		if err := s(); err != nil {
			return err
		}
	}
	return nil
}

// vmm names what runs the VMs, and says so where it is the stand-in.
func (s *story) vmm() string {
	name := filepath.Base(s.d.Tools.VMM)
	if strings.Contains(name, "standin") {
		return s.d.Tools.VMM + ", the stand-in: it speaks Cloud Hypervisor's API and drives QEMU's software emulation,\nas cloud-hypervisor is not on PATH or this machine has no hardware virtualisation"
	}
	return s.d.Tools.VMM
}

func (s *story) makePartitions(c *cast) (string, error) {
	var err error
	big := strings.Repeat("0123456789abcdef\n", 4<<20/17)
	c.work, err = s.d.AddPartition(map[string]string{
		"reports/2026.txt": "The year went well.\n",
		"reports/big.log":  big,
		"payroll/all.txt":  "Nobody's business.\n",
	}, map[string]string{"grant.rego": workPolicy})
	if err != nil {
		return "", err
	}
	c.home, err = s.d.AddPartition(map[string]string{"photos/cat.txt": "Meow.\n"}, map[string]string{"grant.rego": homePolicy})
	if err != nil {
		return "", err
	}
	if err := s.d.HostPolicy("host.rego", hostPolicy); err != nil {
		return "", err
	}
	if c.reader, err = s.d.AddVM(c.work, "reader", "memory_mib = 256\nvcpus = 1\n[labels]\njob = \"reader\"\n"); err != nil {
		return "", err
	}
	if c.viewer, err = s.d.AddVM(c.home, "viewer", "memory_mib = 256\nvcpus = 1\n"); err != nil {
		return "", err
	}
	return "work: " + c.work.ID.String() + "\nhome: " + c.home.ID.String(), nil
}

func (s *story) boot(c *cast) (string, error) {
	ctx, cancel := context.WithTimeout(s.ctx, s.d.Stretched(2*time.Minute))
	defer cancel()
	for _, name := range []string{"work/reader", "home/viewer"} {
		if _, err := s.cli(0, "vm", "start", name); err != nil {
			return "", err
		}
	}
	c.readerGuest, c.viewerGuest = s.d.Guest(c.reader), s.d.Guest(c.viewer)
	for _, vm := range []uuid.UUID{c.reader, c.viewer} {
		if _, err := s.d.Answers(ctx, vm); err != nil {
			return "", err
		}
	}
	ls, err := c.readerGuest.Shell(ctx, "ls -A /run/spectrum/fs 2>/dev/null")
	if err != nil && ls != "" {
		return "", err
	}
	if ls != "" {
		return "", fmt.Errorf("a VM that holds nothing sees %q", ls)
	}
	return s.cli(0, "vm", "list")
}

func (s *story) refused(*cast) error {
	return errorsIn(
		func() error {
			return s.step("a request that policy denies is refused, with the rule's file and line", func() (string, error) {
				out, err := s.cli(3, "grant", "work/reader", "fs:ro:work:/payroll")
				if err != nil {
					return "", err
				}
				return out, mustSay(out, "nobody reads the payroll", "grant.rego:12")
			})
		},
		func() error {
			return s.step("so is one that no rule allows, with the condition that does not hold", func() (string, error) {
				out, err := s.cli(3, "grant", "work/reader", "fs:rw:work:/reports")
				if err != nil {
					return "", err
				}
				return out, mustSay(out, `input.capability.rights == ["read"] does not hold`, "grant.rego:8")
			})
		},
	)
}

func (s *story) granted(c *cast) error {
	return errorsIn(
		func() error {
			return s.step("an allowed request is granted, and returns when the guest has it", func() (string, error) {
				out, err := s.cli(0, "grant", "work/reader", "fs:ro:work:/reports", "--ttl", "1h", "--as", "reports")
				if err != nil {
					return "", err
				}
				grants, err := s.d.Client.ListGrants(s.ctx, api.GrantFilter{VM: "work/reader"})
				if err != nil {
					return "", err
				}
				if len(grants) != 1 || grants[0].State != api.GrantActive {
					return "", fmt.Errorf("not one active grant: %+v", grants)
				}
				c.grant = grants[0]
				return out, mustSay(out, "/run/spectrum/fs/reports")
			})
		},
		func() error {
			return s.step("the guest reads the file through virtio-fs", func() (string, error) {
				out, err := s.inGuest(c.readerGuest, "cat /run/spectrum/fs/reports/2026.txt; grep spectrum/fs /proc/mounts")
				if err != nil {
					return "", err
				}
				return out, mustSay(out, "The year went well.", "virtiofs")
			})
		},
		func() error {
			return s.step("a write through the read-only grant fails in the guest, even as root", func() (string, error) {
				out, err := s.inGuest(c.readerGuest,
					"mount -o remount,rw /run/spectrum/fs/reports 2>&1; echo changed > /run/spectrum/fs/reports/2026.txt; echo status $?")
				if err != nil {
					return "", err
				}
				return out, mustSay(out, "Read-only file system", "status 1")
			})
		},
	)
}

func (s *story) inGuest(g *execclient.Client, line string) (string, error) {
	ctx, cancel := context.WithTimeout(s.ctx, s.d.Stretched(time.Minute))
	defer cancel()
	r, err := g.RunCommand(ctx, execclient.Command{Argv: []string{"sh", "-c", "exec 2>&1; " + line}})
	if err != nil {
		return "", err
	}
	return "guest# " + line + "\n" + string(r.Stdout) + string(r.Stderr), nil
}

func (s *story) foreignToken(c *cast) error {
	return s.step("the other VM presents the first one's token, as a parent and to drop it, and is refused", func() (string, error) {
		token, err := s.d.Client.Token(s.ctx, c.grant.ID.String())
		if err != nil {
			return "", err
		}
		ctx, cancel := context.WithTimeout(s.ctx, s.d.Stretched(time.Minute))
		defer cancel()
		put := execclient.Command{Argv: []string{"sh", "-c", "cat > /tmp/stolen"}, Stdin: []byte(token.Token)}
		if _, err := c.viewerGuest.RunCommand(ctx, put); err != nil {
			return "", err
		}
		asParent, err := s.inGuest(c.viewerGuest,
			"spectrum-agent request fs:ro:"+c.work.ID.String()+":/reports --parent-file /tmp/stolen; echo status $?")
		if err != nil {
			return "", err
		}
		toDrop, err := s.inGuest(c.viewerGuest, "spectrum-agent drop --token-file /tmp/stolen; echo status $?")
		if err != nil {
			return "", err
		}
		out := asParent + toDrop
		for _, said := range []string{asParent, toDrop} {
			if err := mustSay(said, "token was refused", "status 3"); err != nil {
				return "", err
			}
		}
		g, err := s.d.Client.ShowGrant(s.ctx, c.grant.ID.String())
		if err != nil {
			return "", err
		}
		if g.State != api.GrantActive {
			return "", fmt.Errorf("the first VM's grant is %s after that", g.State)
		}
		return out, nil
	})
}

func (s *story) revokedUnderUse(c *cast) error {
	return s.step("while a process in the guest reads a large file in a loop, the grant is revoked", func() (string, error) {
		ctx, cancel := context.WithTimeout(s.ctx, s.d.Stretched(2*time.Minute))
		defer cancel()
		// The open descriptor shows that what is open already is cut as well;
		// dropping the cache makes each turn read through virtio-fs.
		loop := `exec 2>&1 3< /run/spectrum/fs/reports/big.log
n=0
while cat /run/spectrum/fs/reports/big.log > /dev/null; do
	n=$((n+1)); echo read $n; echo 3 > /proc/sys/vm/drop_caches
done
dd bs=64k count=1 skip=40 <&3 > /dev/null || echo "the open file is dead too"
echo the reader ended after $n turns`
		reader, err := c.readerGuest.Start(ctx, execclient.Command{Argv: []string{"sh", "-c", loop}})
		if err != nil {
			return "", err
		}
		defer reader.Kill()
		if err := reader.AwaitOutput(ctx, "read 2"); err != nil {
			return "", err
		}
		out, err := s.cli(0, "revoke", c.grant.ID.String())
		if err != nil {
			return "", err
		}
		end, err := reader.Wait()
		if err != nil {
			return "", fmt.Errorf("the reader did not end: %w", err)
		}
		said := string(end.Stdout)
		if i := strings.LastIndex(said, "cat:"); i >= 0 {
			said = said[i:]
		}
		if err := mustSay(said, "cat:", "the open file is dead too"); err != nil {
			return "", err
		}
		gone, err := s.inGuest(c.readerGuest, "n=0; while [ -e /run/spectrum/fs/reports ] && [ $n -lt 50 ]; do n=$((n+1)); sleep 0.1; done; ls -A /run/spectrum/fs; grep -c spectrum/fs /proc/mounts")
		if err != nil {
			return "", err
		}
		if err := mustSay(gone, "\n0\n"); err != nil {
			return "", err
		}
		return out + "\n" + said + gone, nil
	})
}

func (s *story) onRecord(c *cast) error {
	return errorsIn(
		func() error {
			return s.step("spectrum-cap list --tree shows what there is, and was", func() (string, error) {
				out, err := s.cli(0, "list", "--tree", "--all")
				if err != nil {
					return "", err
				}
				return out, mustSay(out, c.grant.ID.String()[:8], "revoked", "work/reader")
			})
		},
		func() error {
			return s.step("spectrum-cap audit shows every decision", func() (string, error) {
				out, err := s.cli(0, "audit")
				if err != nil {
					return "", err
				}
				if err := mustSay(out, "grant.denied", "grant.requested", "grant.active", "token.refused", "grant.revoking", "grant.revoked"); err != nil {
					return "", err
				}
				verified, err := s.cli(0, "audit", "verify")
				return out + "\n" + verified, err
			})
		},
		func() error {
			return s.step("list -o json says the same to a program: all is revoked, and gone from the world", func() (string, error) {
				out, err := s.cli(0, "list", "--all", "-o", "json")
				if err != nil {
					return "", err
				}
				_, raw, _ := strings.Cut(out, "\n")
				var list struct{ Grants []api.Grant }
				if err := json.Unmarshal([]byte(raw), &list); err != nil {
					return "", fmt.Errorf("list -o json is not JSON: %w", err)
				}
				for _, g := range list.Grants {
					if g.State != api.GrantRevoked || g.Observed.State != "gone" {
						return "", fmt.Errorf("grant %s is %s and %s", g.ID, g.State, g.Observed.State)
					}
				}
				return fmt.Sprintf("%d grant(s), all revoked and gone", len(list.Grants)), nil
			})
		},
	)
}
