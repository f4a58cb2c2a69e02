import sys, time, copy, torch, numpy as np, sample
from examples.robot import *
from tokenizer import psnr
torch.set_num_threads(int(sys.argv[2]) if len(sys.argv)>2 else 1)
name=sys.argv[1]; model,saved=sample.load_model(f"weights/{name}_tiny.pt"); tok=sample.load_tokenizer_for(saved["tokenizer"])
S=sample.settings_of(saved); N=32; E=int(sys.argv[3]) if len(sys.argv)>3 else 8
m,s=model.standardise_actions.mean.numpy(), model.standardise_actions.std.numpy()
def nxt(state,c,pose):
    st=state.copy()
    for j,g in ((23,c[0]),(24,c[1])):
        goal=abs(g)*m[j]+2*s[j]*g; st[j]=st[j]+np.clip(goal-st[j],-s[j]/2,s[j]/2)
    if c[2]: st[20]=np.clip(st[20]+c[2]*s[20]/2, m[20]-2*s[20], m[20]+2*s[20])
    for j in (21,22): st[j]+=np.clip(c[3]-st[j],-.25,.25)
    if not is_free_floor(*moved(pose,st[23],st[24])[:2]): st[23]=0
    return st
def commands(rng):
    out=[]
    while len(out)<N:
        c=(rng.choice([0,1,1,-1]), rng.choice([-1,0,0,1]), rng.choice([-1,0,0,0,1]), rng.choice([0,0,1]))
        out+= [c]*int(rng.integers(4,16))
    return out[:N]
def run(policy,seed,noise):
    rng=np.random.default_rng([7,seed]); w=robot_world(rng); states=list(robot_plan(rng,w,9)); start=copy.deepcopy(w)
    frames=[]
    for st in states: frames.append(robot_view(w,robot_step(w,st),st))
    cs=commands(rng); g=torch.Generator().manual_seed(seed); ahead=[]; last=None; out=[]; ts=[]; truth=[]
    for c in cs:
        t=time.perf_counter()
        if policy=="every" or not ahead or (c!=last and policy!="window"):
            if noise=="same": g.manual_seed(seed)
            p=w.pose.copy(); plan=[states[-1]]
            for _ in range(8):
                plan.append(nxt(plan[-1],c,p)); p=moved(p,plan[-1][23],plan[-1][24])
            past=sample.to_latents(torch.from_numpy(np.stack(frames[-9:])),tok)
            acts=torch.from_numpy(np.stack(states[-9:]+plan[1:])).float()
            d=sample.continue_video(model,tok,past,acts[None],generator=g,**S)[0].numpy()
            ahead=list(zip(plan[1:],d)); last=c
        st,f=ahead.pop(0); states.append(st); frames.append(f); ts.append(time.perf_counter()-t)
        truth.append(robot_view(w,robot_step(w,st),st))
    return psnr(np.stack(frames[9:]),np.stack(truth)), np.array(ts), psnr(np.stack([frames[8]]*N),np.stack(truth))
for policy,noise in (("every","new"),("every","same"),("change","new"),("change","same")):
    r=[run(policy,e,noise) for e in range(E)]
    p=np.stack([x[0] for x in r]).mean(0); t=np.stack([x[1] for x in r]); c=np.stack([x[2] for x in r]).mean(0)
    print(name,policy,noise,"dB frames 1-8,9-16,17-24,25-32:",p.reshape(4,8).mean(1).round(2),"first",p[0].round(2),"copy",c.reshape(4,8).mean(1).round(2),"ms of a dream: median",np.median(t[t>.01])*1e3,"p90",np.quantile(t[t>.01],.9)*1e3,flush=True)
