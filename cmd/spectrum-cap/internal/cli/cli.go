package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"spectrum-os.org/broker/broker/api"
)

// DefaultSocket is where the broker listens unless told otherwise.
const DefaultSocket = "/run/spectrum-broker/host.sock"

// socketEnv names the environment variable for another socket.
const socketEnv = "SPECTRUM_BROKER_SOCKET"

// Host is what a run of the command has to do with.
type Host struct {
	Args           []string // without the program's name
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Getenv         func(string) string
}

// Main runs the command and returns its exit code.
func Main(ctx context.Context, h Host) int {
	a := &app{host: h, now: time.Now}
	root := a.command()
	root.SetArgs(h.Args)
	root.SetIn(h.Stdin)
	root.SetOut(h.Stdout)
	root.SetErr(h.Stderr)
	ran, err := root.ExecuteContextC(ctx)
	if err != nil {
		a.printError(ran, err)
	}
	if a.client != nil {
		a.client.Close()
	}
	return exitCode(err)
}

// app is one run.
type app struct {
	host   Host
	now    func() time.Time
	socket string
	output string
	full   bool // identifiers at full length
	client *api.Client
	names  map[uuid.UUID]string // of partitions; nil: not asked for yet
}

func (a *app) broker() *api.Client {
	if a.client == nil {
		a.client = api.NewClient(a.socketPath())
	}
	return a.client
}

func (a *app) socketPath() string {
	if a.socket != "" {
		return a.socket
	}
	if s := a.host.Getenv(socketEnv); s != "" {
		return s
	}
	return DefaultSocket
}

// note tells the person something that is not the answer.
func (a *app) note(format string, args ...any) {
	_, _ = fmt.Fprintln(a.host.Stderr, "spectrum-cap: "+plain(fmt.Sprintf(format, args...)))
}

// terminal tells whether f is one.
func terminal(f any) (fd int, ok bool) {
	file, ok := f.(*os.File)
	if !ok {
		return 0, false
	}
	return int(file.Fd()), term.IsTerminal(int(file.Fd()))
}

const rootLong = `spectrum-cap asks the broker for capabilities on behalf of a person: which VM
may touch what, for how long, and that it ends.

A VM is spelt PARTITION/ALIAS (builtin/ALIAS for a built-in one), ALIAS where
no other VM has it, or by 8 or more digits of its UUID. A grant is named by its
UUID or 8 or more digits of it. A capability is spelt fs:ro:PARTITION:/path or
fs:rw:PARTITION:/path, with a partition's petname or UUID.`

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "spectrum-cap",
		Short: "Give capabilities to virtual machines, and take them back",
		Long:  rootLong + "\n\nExit codes:\n" + exitCodeText(),
		Example: `  spectrum-cap vm start work/mail
  spectrum-cap grant work/mail fs:ro:work:/invoices --ttl 1h --as invoices
  spectrum-cap list --tree
  spectrum-cap revoke --vm work/mail`,
		Version:           thisVersion().Version,
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		PersistentPreRunE: func(*cobra.Command, []string) error {
			switch a.output {
			case "table", "json", "yaml":
				return nil
			}
			return usage("-o %s: the formats are table, json and yaml", a.output)
		},
	}
	root.SetVersionTemplate(thisVersion().String())
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	f := root.PersistentFlags()
	f.StringVar(&a.socket, "socket", "", "the broker's `socket` (default $"+socketEnv+", else "+DefaultSocket+")")
	f.StringVarP(&a.output, "output", "o", "table", "`format` of the answer: table, json or yaml")
	f.BoolVar(&a.full, "no-trunc", false, "print identifiers at full length in tables")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))

	root.AddCommand(
		a.vmCommand(), a.grantCommand(), a.delegateCommand(), a.renewCommand(), a.revokeCommand(), a.listCommand(), a.showCommand(), a.planCommand(),
		a.explainCommand(), a.tokenCommand(), a.policyCommand(), a.nameCommand(), a.partitionCommand(),
		a.keysCommand(), a.auditCommand(), a.eventsCommand(), a.ledgerCommand(), a.healthCommand(), a.versionCommand(),
		a.completionCommand(), a.referenceCommand(),
	)
	root.SetHelpCommand(&cobra.Command{
		Use: "help [command]", Short: "Help about any command", Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			found, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return usage("there is no command %q", strings.Join(args, " "))
			}
			return found.Help()
		},
	})
	group(root)
	return root
}

// group makes a command that only has subcommands refuse to be run itself.
func group(cmd *cobra.Command) *cobra.Command {
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			cmd.SetOut(cmd.ErrOrStderr())
			_ = cmd.Help()
			return errHelpShown
		}
		hint := ""
		if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
			hint = "; did you mean " + strings.Join(s, " or ") + "?"
		}
		return usage("%s has no command %q%s", cmd.CommandPath(), args[0], hint)
	}
	cmd.SuggestionsMinimumDistance = 2
	return cmd
}

// args is cobra.PositionalArgs whose failures are usage errors.
func args(least, most int, names string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, got []string) error {
		switch {
		case len(got) < least && names != "":
			return usage("%s needs %s", cmd.CommandPath(), names)
		case most >= 0 && len(got) > most:
			return usage("%s does not take %q", cmd.CommandPath(), got[most])
		}
		return nil
	}
}

// within bounds a call whose answer is to come after at most d; the broker
// gets a little longer to say that it did not manage. Zero is no bound.
func within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if d <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, d+answerSlack)
}

const answerSlack = 5 * time.Second

var errHelpShown = &usageError{errors.New("")}
