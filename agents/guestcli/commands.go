package guestcli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"spectrum-os.org/broker/agents/wire"
)

// Options wire the commands to the world.
type Options struct {
	Version string
	Dial    wire.Dialer // the broker's guest API
	// Serve is the agent itself, which "serve" runs.
	Serve    func(ctx context.Context, role string) error
	Out, Err io.Writer
}

var errStillCutting = errors.New("given up, but access is not yet cut")

// cli is what all commands share.
type cli struct {
	Options
	output  string
	timeout time.Duration
}

// Command is the whole command line.
func Command(o Options) *cobra.Command {
	c := &cli{Options: o}
	root := &cobra.Command{
		Use:   "spectrum-agent",
		Short: "The agent of a VM, and the VM's way to ask for capabilities",
		Long: `spectrum-agent runs in every VM. "serve" mounts what the broker plugs in; the
other commands ask the broker for what this VM may have.

` + exitHelp,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetOut(o.Out)
	root.SetErr(o.Err)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return fmt.Errorf("%w: %w", errUsage, err) })
	root.PersistentFlags().StringVarP(&c.output, "output", "o", "table", "how to print: table or json")
	root.PersistentFlags().DurationVar(&c.timeout, "timeout", time.Minute, "how long to wait for the broker")
	root.AddCommand(c.serve(), c.list(), c.request(), c.delegate(), c.token(), c.drop(), c.self(), c.version())
	return root
}

// Main runs the command line and returns the exit code.
func Main(ctx context.Context, o Options, args []string) int {
	root := Command(o)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err != nil {
		fmt.Fprintln(o.Err, "spectrum-agent:", err)
		if strings.HasPrefix(err.Error(), "unknown command") {
			return ExitUsage
		}
	}
	return ExitCode(err)
}

func exactly(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := cobra.ExactArgs(n)(cmd, args); err != nil {
			return fmt.Errorf("%w: %w", errUsage, err)
		}
		return nil
	}
}

// ask runs f with a client and the timeout.
func (c *cli) ask(cmd *cobra.Command, f func(ctx context.Context, client *Client) error) error {
	if c.output != "table" && c.output != "json" {
		return fmt.Errorf("%w: -o is table or json", errUsage)
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), c.timeout)
	defer cancel()
	return f(ctx, NewClient(c.Dial))
}

func (c *cli) serve() *cobra.Command {
	var role string
	cmd := &cobra.Command{
		Use:     "serve",
		Short:   "Answer the broker: mount, unmount, health",
		Example: "  spectrum-agent serve --role app",
		Args:    exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if role != "app" {
				return fmt.Errorf("%w: there is no role %q; this agent has app", errUsage, role)
			}
			return c.Serve(cmd.Context(), role)
		},
	}
	cmd.Flags().StringVar(&role, "role", "app", "what this VM is: app")
	return cmd
}

func (c *cli) list() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List this VM's capabilities",
		Long:  "List this VM's capabilities.\n\n" + exitHelp,
		Example: `  spectrum-agent list
  spectrum-agent list -o json`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.ask(cmd, func(ctx context.Context, client *Client) error {
				grants, err := client.List(ctx)
				if err != nil {
					return err
				}
				if c.output == "json" {
					return c.json(map[string]any{"capabilities": grants})
				}
				return c.table(grants)
			})
		},
	}
}

func (c *cli) request() *cobra.Command {
	var (
		r                     Request
		ttl                   time.Duration
		parentFile, tokenFile string
		showToken             bool
	)
	cmd := &cobra.Command{
		Use:   "request CAPABILITY",
		Short: "Ask for a capability",
		Long: `Ask for a capability, and return when policy has decided and the broker has
made it so. CAPABILITY is spelled as everywhere: fs:ro:self:/path, where self
is the partition of this VM, or fs:rw:PARTITION-UUID:/path.

The grant's token is a secret. It is shown only with --token and kept only
with --token-file.

` + exitHelp,
		Example: `  spectrum-agent request fs:ro:self:/photos --ttl 1h --label photos
  spectrum-agent request fs:ro:self:/photos/2024 --parent-file photos.token
  spectrum-agent request fs:rw:self:/notes --token-file notes.token`,
		Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Capability = args[0]
			var err error
			if r.TTLSeconds, err = wholeSeconds(ttl); err != nil {
				return err
			}
			if r.Parent, err = readToken(parentFile); err != nil {
				return err
			}
			return c.ask(cmd, func(ctx context.Context, client *Client) error {
				g, err := client.Request(ctx, r)
				if err != nil {
					return err
				}
				return c.granted(g, tokenFile, showToken)
			})
		},
	}
	f := cmd.Flags()
	f.DurationVar(&ttl, "ttl", 0, "how long it is wanted; without it, until this VM ends")
	f.StringVar(&r.Label, "label", "", "the name of its directory in "+wire.MountRoot)
	f.StringVar(&parentFile, "parent-file", "", "file with the token to derive it from")
	f.StringVar(&tokenFile, "token-file", "", "write the token to this new file, readable by its owner only")
	f.BoolVar(&showToken, "token", false, "print the token")
	return cmd
}

func (c *cli) granted(g Granted, tokenFile string, showToken bool) error {
	if tokenFile != "" {
		if err := writeToken(tokenFile, g.Token); err != nil {
			return err
		}
	}
	if !showToken {
		g.Token = ""
	}
	if c.output == "json" {
		out := map[string]any{"grant": g.Grant}
		if showToken {
			out["token"] = g.Token
		}
		return c.json(out)
	}
	if err := c.table([]Grant{g.Grant}); err != nil {
		return err
	}
	if showToken {
		fmt.Fprintln(c.Out, g.Token)
	}
	return nil
}

func (c *cli) drop() *cobra.Command {
	var tokenFile string
	cmd := &cobra.Command{
		Use:   "drop [GRANT]",
		Short: "Give a capability up, or take back what was delegated, with all derived from it",
		Long: "Give a capability up, or take back what was delegated from one, with all\nderived from it. What this VM gives up itself is cut when it returns.\n\n" +
			exitHelp,
		Example: `  spectrum-agent drop 3f0c2f4e-6f38-4a53-9f43-3c1b8d8f0a11
  spectrum-agent drop --token-file notes.token`,
		Args: func(_ *cobra.Command, args []string) error {
			if (len(args) == 1) == (tokenFile != "") || len(args) > 1 {
				return fmt.Errorf("%w: give one grant, or --token-file", errUsage)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			token, err := readToken(tokenFile)
			if err != nil {
				return err
			}
			if len(args) == 1 {
				if err := isID("a grant", args[0]); err != nil {
					return err
				}
			}
			return c.ask(cmd, func(ctx context.Context, client *Client) error {
				var g Grant
				if token != "" {
					g, err = client.DropToken(ctx, token)
				} else {
					g, err = client.Drop(ctx, args[0])
				}
				if err != nil {
					return err
				}
				return c.dropped(g)
			})
		},
	}
	cmd.Flags().StringVar(&tokenFile, "token-file", "", "file with the token of the grant")
	return cmd
}

func (c *cli) dropped(g Grant) error {
	var err error
	if c.output == "json" {
		err = c.json(map[string]any{"grant": g})
	} else {
		err = c.table([]Grant{g})
	}
	if err == nil && g.State == "revoking" {
		err = errStillCutting
	}
	return err
}

func (c *cli) self() *cobra.Command {
	return &cobra.Command{
		Use:     "self",
		Short:   "Show who the broker says this VM is",
		Long:    "Show who the broker says this VM is.\n\n" + exitHelp,
		Example: "  spectrum-agent self -o json",
		Args:    exactly(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.ask(cmd, func(ctx context.Context, client *Client) error {
				s, err := client.Self(ctx)
				if err != nil {
					return err
				}
				if c.output == "json" {
					return c.json(s)
				}
				return c.rows([]string{"VM", "PARTITION", "ROLE"}, [][]string{{s.ID, orDash(s.Partition), orDash(s.Role)}})
			})
		},
	}
}

func (c *cli) version() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Show the version",
		Example: "  spectrum-agent version",
		Args:    exactly(0),
		RunE: func(*cobra.Command, []string) error {
			if c.output == "json" {
				return c.json(map[string]string{"version": c.Version})
			}
			fmt.Fprintln(c.Out, c.Version)
			return nil
		},
	}
}

func (c *cli) json(v any) error {
	enc := json.NewEncoder(c.Out)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func (c *cli) table(grants []Grant) error {
	rows := make([][]string, 0, len(grants))
	for _, g := range grants {
		expires := "-"
		if g.Expires != nil {
			expires = g.Expires.Local().Format(time.RFC3339)
		}
		uses := "-"
		if g.MaxUses != nil {
			uses = fmt.Sprint("at most ", *g.MaxUses)
			if g.Uses != nil {
				uses = fmt.Sprintf("%d of %d", *g.Uses, *g.MaxUses)
			}
		}
		rows = append(rows, []string{g.ID, g.State, g.Spelling, orDash(g.MountPath), expires, uses, orDash(g.From)})
	}
	return c.rows([]string{"GRANT", "STATE", "CAPABILITY", "MOUNTED AT", "EXPIRES", "USES", "FROM"}, rows)
}

func (c *cli) rows(header []string, rows [][]string) error {
	w := tabwriter.NewWriter(c.Out, 0, 0, 2, ' ', 0)
	for _, row := range append([][]string{header}, rows...) {
		for i, cell := range row {
			row[i] = wire.Printable(cell, 5000)
		}
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	return w.Flush()
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// readToken reads the token in file; no file, no token.
func readToken(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	f, err := os.Open(file)
	if err != nil {
		return "", fmt.Errorf("cannot read the token: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, wire.MaxBody))
	if err != nil {
		return "", fmt.Errorf("cannot read the token: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" {
		return "", fmt.Errorf("%w: %s holds no token", errUsage, file)
	}
	return token, nil
}

// writeToken makes a new file, so that it never writes through a link or
// into a file that others may read.
func writeToken(file, token string) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("cannot keep the token: %w", err)
	}
	_, err = fmt.Fprintln(f, token)
	return errors.Join(err, f.Close())
}
